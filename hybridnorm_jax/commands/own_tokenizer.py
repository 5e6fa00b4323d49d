"""The tokenizer of a trained model, for commands that read or write text and no data."""

from collections.abc import Sequence

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import Tokenizer, load_tokenizer
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.trained_before import Trained, check_tokenizer_alone


def own_tokenizer(
    data: DataSection, known: Sequence[Trained], *, vocab_size: int, where: str, is_named: bool = False
) -> Tokenizer | None:
    """The tokenizer that data.tokenizer names; None: nothing says which one is the model's.

    It needs no separator: without one no document ends.

    Args:
      data: of the model.
      known: what the model was trained on.
      vocab_size: of the model.
      where: the model's directory, for messages.
      is_named: whether the option --tokenizer names data.tokenizer, rather than the run.

    Raises:
      UserError: its file cannot be read, it is another one than in training, or it has more tokens than the model.
    """
    if not data.knows_tokenizer and not is_named:
        return None
    try:
        tokenizer = load_tokenizer(data, needs_separator=False)
        check_tokenizer_alone(known, data, tokenizer, where=where)
        if tokenizer.vocab_size > vocab_size:
            wrong = f"has {tokenizer.vocab_size:,} tokens, but the model knows {vocab_size:,}"
            raise UserError(f"data.tokenizer={data.tokenizer}: {wrong}; name the tokenizer that it was trained with")
    except UserError as error:
        if not is_named:
            raise
        raise UserError(str(error).replace("data.tokenizer=", "--tokenizer ")) from error
    return tokenizer
