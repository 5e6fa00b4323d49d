"""`hybridnorm completion bash | zsh | fish`: print a script with which the shell completes `hybridnorm`.

The script asks this program, with --line (bash) or --arguments (zsh and fish), how the typed line may go on. An answer
is one candidate a line, with a space at the end where the argument is whole.
"""

import re
import shlex
from collections.abc import Sequence

from hybridnorm_jax.commands.candidates import SHELLS, candidates
from hybridnorm_jax.commands.program import wants_help
from hybridnorm_jax.errors import UserError, did_you_mean

USAGE = """usage: hybridnorm completion bash | zsh | fish

Prints a script that completes commands, configurations, YAML files, run
directories, keys and their values. To install it:

  mkdir -p ~/.local/share/bash-completion/completions
  cd ~/.local/share/bash-completion/completions
  hybridnorm completion bash > hybridnorm

  mkdir -p ~/.zfunc && hybridnorm completion zsh > ~/.zfunc/_hybridnorm
  # and in ~/.zshrc, before compinit:  fpath+=~/.zfunc

  hybridnorm completion fish > ~/.config/fish/completions/hybridnorm.fish

or, in ~/.bashrc:  eval "$(hybridnorm completion bash)"."""

# bash splits words at = and : as well. Only the whole line says what was typed; $2 is the part that bash replaces.
BASH = r"""# Completion of hybridnorm for bash, from `hybridnorm completion bash`.
_hybridnorm() {
    local candidate
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("$candidate")
    done < <("${1/#\~/$HOME}" completion --line "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
}
complete -o nospace -F _hybridnorm hybridnorm
"""

# The file works from a folder of $fpath, where compinit calls it, and when it is sourced.
ZSH = r"""#compdef hybridnorm
# Completion of hybridnorm for zsh, from `hybridnorm completion zsh`.
_hybridnorm() {
    local candidate
    local -a whole begun before
    before=("${(@Q)words[2,CURRENT-1]}")
    for candidate in "${(@f)$(${~words[1]} completion --arguments "${before[@]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        if [[ $candidate == *' ' ]]; then
            whole+=("${candidate% }")
        elif [[ -n $candidate ]]; then
            begun+=("$candidate")
        fi
    done
    (( $#whole )) && compadd -a whole
    (( $#begun )) && compadd -S '' -a begun
    return $(( ! ($#whole + $#begun) ))
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _hybridnorm "$@"
else
    compdef _hybridnorm hybridnorm
fi
"""

# fish itself leaves the space out after = / and the like.
FISH = r"""# Completion of hybridnorm for fish, from `hybridnorm completion fish`.
function __hybridnorm_candidates
    set -l before (commandline --tokenize --cut-at-cursor --current-process)
    set -l typed (commandline --cut-at-cursor --current-token | string trim --left --chars='"\'')
    command $before[1] completion --arguments $before[2..-1] "$typed" 2>/dev/null | string trim --right
end
complete --command hybridnorm --no-files --arguments '(__hybridnorm_candidates)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm completion SHELL`; the scripts call it with --line and --arguments."""
    if not arguments:
        raise UserError(f"completion: name a shell: {', '.join(SHELLS)}")
    first, rest = arguments[0], arguments[1:]
    if first == "--line" and len(rest) == 2:
        line, word = rest
        found = for_bash(line, word)
    elif first == "--arguments" and rest:
        found = candidates(rest)
    elif wants_help(arguments):
        found = [USAGE]
    elif first not in SCRIPTS:
        raise UserError(f"completion {first}: no such shell{did_you_mean(first, SHELLS)}")
    elif rest:
        raise UserError(f"completion {first} {rest[0]}: takes one shell")
    else:
        found = [SCRIPTS[first].rstrip()]
    print("\n".join(found))


def for_bash(line: str, word: str) -> list[str]:
    """Candidates for the line up to the cursor, each without what bash keeps.

    Args:
      line: starts with the name of the program.
      word: the end of the line that bash replaces; in `hybridnorm train model.scheme=hy` it is `hy`.
    """
    arguments, is_quoted = split(line)
    typed = arguments[-1]
    kept = len(typed) - len(word) if typed.endswith(word) else 0
    found = [candidate[kept:] for candidate in candidates(arguments[1:])]
    return found if is_quoted else [_escape(candidate) for candidate in found]


def split(line: str) -> tuple[list[str], bool]:
    """(the arguments of a shell's command line, whether the last one is an open quotation).

    The last argument is empty where the line ends in a space.
    """
    for quote in ("", "'", '"'):
        try:
            arguments = shlex.split(line + quote)
        except ValueError:  # a quotation is open
            continue
        is_new = quote == "" and line[-1:].isspace()
        return [*arguments, ""] if is_new else arguments, quote != ""
    return ["", ""], False


def _escape(candidate: str) -> str:
    """With backslashes before what is special in bash; the space at the end is no part of the argument."""
    text = candidate.removesuffix(" ")
    return re.sub(r"([\s'\"\\$&;()<>|*?`])", r"\\\1", text) + candidate[len(text) :]
