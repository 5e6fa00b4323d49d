"""Arguments that no command takes."""

import random
from collections.abc import Iterator

from hybridnorm_jax.commands.main import COMMANDS
from tests.malformed.case import Case

ODD = (
    "train.steps",
    "=3",
    "=",
    "==",
    "train.=3",
    ".steps=3",
    "train..steps=3",
    "a.b.c.d=1",
    "train.steps.more=1",
    "train=3",
    "train.step=3",
    "trian.steps=3",
    "--train.steps=3",
    "-",
    "--",
    "---",
    "-x",
    "--no-such-option",
    "--json=1=2",
    "tra\u0456n.steps=3",
    "train.steps=\uff13",
    "\u202etrain.steps=3",
    "train.steps='3",
    'train.steps="3',
    "'train.steps=3'",
    "train.steps=[3",
    "train.steps=3]",
    "train.steps={",
    "train.steps=3,4",
    "train.steps=*a",
    "train.steps=&a 3",
    "train.steps=!!int 3",
    "run.name=!!python/object/apply:os.system ['touch ran']",
    "train.steps=3\ntrain.seed=1",
    "data.files[0]=a",
    "data.validation.=[a]",
    "data.validation=[a]",
    "data.validation.a.b.c=[a]",
    "mesh.rules.nothing=[data]",
    "mesh.rules.batch=[]",
    "mesh.rules.vocab=[nothing]",
    "mesh.rules.vocab=[tensor+tensor]",
    "run.name=a/b",
    "run.name=..",
    "run.name=" + "x" * 300,
    "run.dir=/dev/null/x",
    "run.dir=/proc/x",
    "init_from=nowhere",
    "init_from=/dev/null",
    "init_from=text.txt",
    "data.cache_dir=/dev/null/x",
    "data.tokenizer=nowhere",
    "data.tokenizer=/dev/null",
    "data.tokenizer=.",
    "data.files=[]",
    "data.files=[nowhere.txt]",
    "data.files=[nowhere*.txt]",
    "data.files=[.]",
    "data.files=[/dev/null]",
    "data.files=[/dev/zero]",
    "data.files=['']",
    "data.files=['**']",
    "data.files=['[']",
    "data.files=[text.txt, text.txt]",
    "data.files=[tiny.yaml]",
    "x" * 100_000,
    "x" * 100_000 + "=1",
    "nowhere.yaml",
    "nowhere",
    "",
    " ",
    "\n",
    "\udcff",
    "\udcff=1",
    "train.seed=\udcff",
    "run.name=\udcff",
)
# What ODD has that is right, or that is right for one command.
MAYBE = (
    "data.files=[text.txt, text.txt]",
    "data.files=['**']",
    "data.files=[tiny.yaml]",
    "run.dir=/dev/null/x",
    "run.dir=/proc/x",
    "data.cache_dir=/dev/null/x",
)
CALLS = {
    "train": ("train", "tiny.yaml"),
    "eval": ("eval", "runs/saved"),
    "plan": ("plan", "tiny.yaml", "--topology=gpu:1x80GB"),
    "lab signal": ("lab", "signal"),
    "lab compare": ("lab", "compare", "tiny.yaml"),
}
OTHERS = (
    ("convert",),
    ("convert", "nowhere", "out", "--form=pre_rmsnorm"),
    ("convert", ".", "out", "--form=pre_rmsnorm"),
    ("convert", "text.txt", "out", "--form=pre_rmsnorm"),
    ("convert", "runs/saved", "out", "--form=nothing"),
    ("convert", "runs/saved", "runs", "--form=pre_rmsnorm"),
    ("convert", "runs/saved", "out", "--form=pre_crmsnorm", "--pad-to=0"),
    ("convert", "runs/saved", "out", "--form=pre_crmsnorm", "--pad-to=" + "9" * 5000),
    ("convert", "runs/saved", "out", "--form=pre_crmsnorm", "--pad-to=99999999999"),
    ("convert", "runs/saved", "out", "--form=pre_crmsnorm", "--pad-to=x"),
    ("convert", "runs/saved", "out", "--form=pre_rmsnorm", "--text=nowhere"),
    ("convert", "runs/saved", "out", "--form=pre_rmsnorm", "--dtype=int8"),
    ("export",),
    ("export", "nowhere", "out"),
    ("export", ".", "out"),
    ("export", "text.txt", "out"),
    ("export", "runs/saved", "runs"),
    ("export", "runs/saved", "runs/saved/out"),
    ("export", "runs/saved", "out", "--format=gguf"),
    ("export", "runs/saved", "out", "--dtype=int8"),
    ("export", "runs/saved", "out", "--license="),
    ("export", "runs/saved", "out", "--tokenizer=nowhere"),
    ("export", "runs/saved", "out", "--tokenizer=text.txt"),
    ("schemes", "nothing"),
    ("schemes", "0"),
    ("schemes", "-1"),
    ("schemes", "9" * 5000),
    ("schemes", "99999999999"),
    ("schemes", "\u0663"),
    ("schemes", "\u00b2"),
    ("schemes", "pre", "pre", "x"),
    ("schemes", "x" * 100_000),
    ("completion",),
    ("completion", "csh"),
    ("completion", "bash", "zsh"),
    ("completion", "--line"),
    ("completion", "--nothing"),
    ("nothing",),
    ("--nothing",),
    ("x" * 100_000,),
    ("\udcff",),
    ("lab", "nothing"),
    ("lab", "report"),
    ("lab", "report", "nowhere"),
    ("lab", "report", "text.txt"),
    ("lab", "report", "runs", "baseline=nothing"),
    ("lab", "report", "runs", "runs"),
    ("lab", "compare", "tiny.yaml", "schemes=[]"),
    ("lab", "compare", "tiny.yaml", "schemes=[nothing]"),
    ("lab", "compare", "tiny.yaml", "schemes=pre"),
    ("lab", "compare", "tiny.yaml", "schemes=[pre, pre]"),
    ("lab", "compare", "tiny.yaml", "schemes=null"),
    ("lab", "compare", "tiny.yaml", "seeds=[-1]"),
    ("lab", "compare", "tiny.yaml", "seeds=[x]"),
    ("lab", "compare", "tiny.yaml", "seeds=[1.5]"),
    ("lab", "compare", "tiny.yaml", "seeds=[" + "9" * 5000 + "]"),
    ("lab", "compare", "tiny.yaml", "seeds=" + str(list(range(200_000)))),
    ("lab", "compare", "tiny.yaml", "learning_rates=[.inf]"),
    ("lab", "compare", "tiny.yaml", "learning_rates=[.nan]"),
    ("lab", "compare", "tiny.yaml", "learning_rates=[0]"),
    ("lab", "compare", "tiny.yaml", "learning_rates=[1" + "0" * 400 + "]"),
    ("lab", "compare", "tiny.yaml", "--only=x"),
    ("lab", "compare", "tiny.yaml", "--only=" + "9" * 5000),
    ("lab", "compare", "tiny.yaml", "--only=999"),
    ("lab", "compare", "tiny.yaml", "--only=\u00b2"),
    ("lab", "compare", "tiny.yaml", "--emit-jobs=nothing"),
    ("lab", "compare", "tiny.yaml", "--emit-jobs"),
    ("lab", "signal", "schemes=[nothing]"),
    ("lab", "signal", "depths=[0]"),
    ("lab", "signal", "depths=[" + "9" * 30 + "]"),
    ("lab", "signal", "depths=[x]"),
    ("lab", "signal", "sequences=0"),
    ("lab", "signal", "sequences=" + "9" * 30),
    ("lab", "signal", "sequences=100000000000"),
    ("lab", "signal", "seq_len=-1"),
    ("lab", "signal", "seq_len=1000000000000"),
    ("lab", "signal", "initializers=[nothing]"),
    ("lab", "signal", "out="),
    ("eval",),
    ("eval", "nowhere"),
    ("eval", "text.txt"),
    ("eval", "."),
    ("eval", "runs"),
    ("eval", ""),
    ("eval", "runs/saved/checkpoints/000002"),
    ("eval", "runs/saved/checkpoints/x"),
    ("eval", "runs/saved/checkpoints/" + "9" * 5000),
    ("eval", "gs://nowhere"),
    ("plan",),
    ("plan", "tiny.yaml"),
    ("plan", "tiny.yaml", "--topology=x"),
    ("plan", "tiny.yaml", "--topology="),
    ("plan", "tiny.yaml", "--topology=gpu:0x80GB"),
    ("plan", "tiny.yaml", "--topology=gpu:99999999999x80GB"),
    ("plan", "tiny.yaml", "--topology=gpu:8x0GB"),
    ("plan", "tiny.yaml", "--topology=gpu:" + "9" * 5000 + "x80GB"),
    ("plan", "tiny.yaml", "--topology=v5e:0x0"),
    ("plan", "tiny.yaml", "--topology=v5e:3x5"),
    ("plan", "tiny.yaml", "--topology=0xv5e:4x8"),
    ("plan", "tiny.yaml", "--topology=99999999xv5e:4x8"),
    ("plan", "--table"),
    ("plan", "--table=nowhere.md"),
    ("plan", "--table=text.txt"),
    ("plan", "--table=good.npy"),
    ("plan", "--table=."),
)


def argument_cases(rng: random.Random) -> Iterator[Case]:
    """Each odd argument for each command that takes keys, and each odd call of the others."""
    for name, call in CALLS.items():
        for argument in ODD:
            names = (*_parts(argument), *((name.split()[0],) if not argument.strip() else ()))
            base = "run" if name == "eval" else "text"
            needs_data = argument.startswith(("data.", "run.", "init_from", "mesh.")) and name != "train"
            refused = argument not in MAYBE and not needs_data
            yield Case(f"argument of {name}", (*call, argument), names, base=base, refused=refused)
    for call in OTHERS:
        names = tuple(part for argument in call for part in _parts(argument))
        yield Case(f"call of {call[0]}"[:30], call, names, base="run")
    for command in COMMANDS:
        for option in ("--no-such-option", "-z", "--=", "--\udcff"):
            yield Case(f"option of {command}", (command, option), (command, *_parts(option)))


def _parts(argument: str) -> Iterator[str]:
    """What of it a message may show: escaped, shortened, its key or its value alone."""
    if not argument.strip():
        yield from ("''", "' '", "\\n")
    if argument in ("", "."):
        yield "/case"
    key, _, value = argument.partition("=")
    for text in (argument, key, value.strip("[]'")):
        shown = text.encode("utf-8", errors="backslashreplace").decode()
        printable = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)
        if printable.strip():
            yield printable[:15]
    if argument.startswith("data.files="):
        # What is read has no text that could be held out, or is another file of the folder.
        yield from ("data.validation_fraction", "train.seq_len", "good.npy", "data.source")
