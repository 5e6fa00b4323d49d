"""`hybridnorm data inspect`: show the data of a run as the model sees them."""

from collections.abc import Sequence

from hybridnorm_jax.commands.program import ArgumentParser, wants_help
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.streams import sturdy_streams

USAGE = """usage: hybridnorm data inspect [CONFIG ...] [FILE ...] [key=value ...]

Shows documents as the model sees them.
`hybridnorm data inspect --help` says more."""
INSPECT_USAGE = """hybridnorm data inspect [CONFIG ...] [FILE ...] [key=value ...]
                               [--rows N] [--seconds S]"""
DESCRIPTION = """Prints the first rows of the first step of a run as the model sees them: the
segments of each row, their positions, the targets that count in the loss, and
the first and last tokens as text; the share of padding; how many rows there are;
and how fast they are read, in all and for each core. Nothing is trained.
CONFIG, FILE and key=value are those of `hybridnorm train`.

  hybridnorm data inspect quickstart data.segment_ids=true --rows 2"""
MOST_ROWS, MOST_SECONDS = 1000, 3600


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm data inspect [CONFIG ...] [key=value ...] [--rows N] [--seconds S]`."""
    action, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if action != "inspect":
        check_syntax("data", arguments)
        if wants_help(arguments):
            print(USAGE)
            return
        raise UserError(f"data {action}: no such action{did_you_mean(action, ['inspect'])}")
    check_syntax("data inspect", rest)
    options, settings = _parser().parse_known_args(rest)
    if not 0 <= options.rows <= MOST_ROWS:
        raise UserError(f"--rows {options.rows}: must be from 0 to {MOST_ROWS:,}")
    if not 0 <= options.seconds <= MOST_SECONDS:
        raise UserError(f"--seconds {options.seconds}: must be from 0 to {MOST_SECONDS:,}")
    config = parse(settings)
    with sturdy_streams():
        _inspect(config, rows=options.rows, seconds=options.seconds)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("hybridnorm data inspect", usage=INSPECT_USAGE, description=DESCRIPTION)
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="rows that are shown (default: 3)")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=2.0, help="how long reading is measured; 0: not (default: 2)"
    )
    return parser


def _inspect(config: RunConfig, *, rows: int, seconds: float) -> None:
    # Only now: together they take seconds to import.
    from hybridnorm_jax.data import open_data, train_iterator
    from hybridnorm_jax.data.inspection import describe, first_rows, measure_rate, shares
    from hybridnorm_jax.data.mixture import order_of

    train = config.train
    data = open_data(config.data, seq_len=train.seq_len, vocab_size=config.model.vocab_size)
    print(data.description)
    trained = {f"train {name}".rstrip(): source.train for name, source in data.sources.items()}
    held_out = {
        f"validation {name}" if name in data.sources else name: found for name, found in data.validation.items()
    }
    for name, found in {**trained, **held_out}.items():
        share = shares(found)
        documents = "" if share.documents is None else f", {share.documents:.2f} documents a row"
        text = "" if found.bytes_per_token is None else f", {found.bytes_per_token:.3f} bytes of text a token"
        print(
            f"{name}: {len(found):,} rows of {train.seq_len:,}, padding {share.padding:.3%}, without loss "
            f"{share.without_loss:.3%}{documents}{text}"
        )
    order = order_of(config, data)

    def batches():
        return train_iterator(
            order,
            batch_size=train.batch_size,
            accumulation=train.grad_accumulation,
            read_threads=config.data.read_threads,
        )

    if rows:
        print(f"\nThe first rows of step 1, train.data_seed={train.order_seed}:")
    for number, row in enumerate(first_rows(next(batches()), rows)):
        print(f"row {number}:", *describe(row, data.tokenizer), sep="\n")
    if seconds:
        rate = measure_rate(batches(), seconds)
        threads = f"data.read_threads={config.data.read_threads}"
        print(f"\nreads {rate.per_second:,.0f} tokens/s with {threads}, {rate.per_core:,.0f} tokens/s for each core")
