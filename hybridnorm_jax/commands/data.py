"""`hybridnorm data inspect`: show the data of a run as the model sees them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridnorm_jax.commands.program import ArgumentParser, subcommand
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.streams import sturdy_streams

if TYPE_CHECKING:
    from hybridnorm_jax.data import Rows

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


def run(arguments: Sequence[str]) -> int | None:
    """`hybridnorm data inspect [CONFIG ...] [key=value ...] [--rows N] [--seconds S]`."""
    if subcommand("data", arguments, ["inspect"], USAGE) is None:
        return 0 if arguments else 2
    rest = arguments[1:]
    check_syntax("data inspect", rest)
    options, settings = _parser().parse_known_args(rest)
    if not 0 <= options.rows <= MOST_ROWS:
        raise UserError(f"--rows {options.rows}: must be from 0 to {MOST_ROWS:,}")
    if not 0 <= options.seconds <= MOST_SECONDS:
        raise UserError(f"--seconds {options.seconds}: must be from 0 to {MOST_SECONDS:,}")
    config = parse(settings)
    with sturdy_streams():
        _inspect(config, rows=options.rows, seconds=options.seconds)
    return None


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
    from hybridnorm_jax.data.inspection import describe, first_rows, measure_rate
    from hybridnorm_jax.data.mixture import mixture_of, order_of
    from hybridnorm_jax.training.start_report import mixture_table

    train = config.train
    data = open_data(config.data, seq_len=train.seq_len, vocab_size=config.model.vocab_size)
    for name, source in data.sources.items():
        print(f"{name}: {source.description}" if name else source.description)
    trained_on = {f"train {name}".strip(): source.train for name, source in data.sources.items()}
    for name, found in {**trained_on, **data.validation}.items():
        print(_summary(name, found, train.seq_len))
    mixture = mixture_of(config, data)
    if mixture is not None:
        print(f"\n{mixture_table(config, data, mixture)}")
        mixture.check_epochs()
    order = order_of(config, data)

    def batches():
        threads = config.data.read_threads
        size, accumulation = train.batch_size, train.grad_accumulation
        return train_iterator(order, batch_size=size, accumulation=accumulation, read_threads=threads)

    if rows:
        print(f"\nThe first rows of step 1, train.data_seed={train.order_seed}:")
        names = {id(source.train): name for name, source in data.sources.items()}
        places = order.places(0, train.batch_size, list(range(min(rows, train.batch_size))))
        for number, (place, row) in enumerate(zip(places, first_rows(next(batches()), rows), strict=True)):
            name = names[id(place.rows)]
            print(f"row {number}{f' of {name}' if name else ''}:", *describe(row, data.tokenizer), sep="\n")
    if seconds:
        rate = measure_rate(batches(), seconds)
        threads = f"data.read_threads={config.data.read_threads}"
        print(f"\nreads {rate.per_second:,.0f} tokens/s with {threads}, {rate.per_core:,.0f} tokens/s for each core")


def _summary(name: str, rows: "Rows", seq_len: int) -> str:
    """One line about a set of rows."""
    from hybridnorm_jax.data.inspection import shares

    share = shares(rows)
    documents = "" if share.documents is None else f", {share.documents:.2f} documents a row"
    text = "" if rows.bytes_per_token is None else f", {rows.bytes_per_token:.3f} bytes of text a token"
    counts = f"padding {share.padding:.3%}, without loss {share.without_loss:.3%}"
    return f"{name}: {len(rows):,} rows of {seq_len:,}, {counts}{documents}{text}"
