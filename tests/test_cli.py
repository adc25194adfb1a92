"""Laws of the command line: a user error is one line and exit code 2; only bugs have tracebacks."""

import dataclasses
import json
import runpy
import subprocess
import sys

import jax
import pytest
from absl import flags

from deq_flax import cli
from deq_flax.config import resolve
from deq_flax.errors import UserError
from tests.commands import ROOT

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="base"):
    if variant not in ("base", "tiny"):
        raise ValueError(f"unknown variant {variant!r}; known: base, tiny")
    sizes = {"d_model": 32, "d_embed": 32, "n_head": 2, "d_head": 16, "d_inner": 8}
    model = {"name": "deq_transformer", "cutoffs": (1, 2)} | sizes
    sections = {"data": {"name": "pydoc"}, "model": model, "train": {"steps": 10}}
    return ConfigDict(sections | {"task": "language"}).lock()
"""


class Command:
    """A command built like the real ones, with flags of its own."""

    def __init__(self, body=None):
        self.values = flags.FlagValues()
        self.config = cli.config_flag(self.values)
        flags.DEFINE_string("workdir", None, "folder of the run", flag_values=self.values)
        flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do", flag_values=self.values)
        self.seen = self.resolved = None
        self.body = body

    def __call__(self, *arguments, **options):
        def main(*positional):
            self.resolved = self.values["config"].resolved
            self.seen = positional if self.resolved is None else self.resolved
            return self.body() if self.body else None

        main.__module__ = __name__
        with pytest.raises(SystemExit) as caught:
            cli.run(main, ["command", *arguments], flag_values=self.values, **options)
        return caught.value.code


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def the_error(capsys):
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_overrides_reach_the_config(config):
    command = Command()
    arguments = ["--config.model.cutoffs=1000,2000", "--config.eval.max_steps_sweep=(3,)", "--config.train.steps", "7"]
    arguments += ["--noconfig.model.weight_norm", "--config.model.pre_norm", "--config.optimizer.learning_rate=2"]
    arguments += ["--config.deq.solver_options.memory=4", "--config.data.path=123"]
    assert command("--config", f"{config}:tiny", *arguments) == 0
    model, deq = command.seen.model, command.seen.deq
    assert (model.cutoffs, model.weight_norm, model.pre_norm, model.d_model) == ((1000, 2000), False, True, 32)
    assert command.seen.eval.max_steps_sweep == (3,) and command.seen.train.steps == 7
    assert command.seen.optimizer.learning_rate == 2.0 and isinstance(command.seen.optimizer.learning_rate, float)
    assert deq.solver_options == {"memory": 4} and command.seen.data.path == "123"


def test_an_empty_tuple_can_be_given(config):
    command = Command()
    assert command("--config", config, "--config.model.cutoffs=", "--config.model.div_value=1") == 0
    assert command.seen.model.cutoffs == ()


def test_a_model_can_be_chosen_by_name(config):
    command = Command()
    assert command("--config", config, "--config.model.blocks=3", "--config.model.name=transformer_xl") == 0
    assert command.seen.model.name == "transformer_xl" and command.seen.model.blocks == 3 and command.seen.deq is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.modle.d_model=3"], "--config has no section 'modle'; did you mean 'model'?"),
        (["--config.model.d_modle=3"], "--config.model has no key 'd_modle'; did you mean 'd_model'?"),
        (["--config.zzz=3"], "no section 'zzz'; known: data, model, deq"),
        (["--config.train.steps=abc"], "--config.train.steps must be a whole number, not 'abc'"),
        (["--config.train.steps=1.5"], "--config.train.steps must be a whole number, not '1.5'"),
        (["--config.train=3"], "--config.train.KEY=VALUE"),
        (["--config.model.weight_norm=maybe"], "--config.model.weight_norm must be True or False, not 'maybe'"),
        (["--config.model.cutoffs=1,b"], "--config.model.cutoffs must be a whole number, not 'b'"),
        (["--config.model.cutoffs=1,2.5"], "not '2.5'"),
        (["--config.data.path"], "needs a value"),
        (["--config.model.name=deq"], "unknown model.name 'deq'; known: deq_transformer"),
        (["--config.model.name=mdeq"], "is no model for task 'language'"),
        (["--config.deq.solver_options.memroy=3"], "deq.solver_options has no key 'memroy'; did you mean 'memory'?"),
        (["--mode=trian"], "train|eval"),
        (["--wrkdir=x"], "Did you mean: workdir"),
        (["--workdir"], "Missing value for flag --workdir"),
        (["stray"], "got 1 arguments besides flags (stray), need none"),
    ],
)
def test_mistakes_in_flags_are_one_line(config, capsys, arguments, message):
    assert Command()("--config", config, *arguments) == 2
    assert message in the_error(capsys)


@pytest.mark.parametrize(("argument", "listed"), [("--config.zzz=3", True), ("--config.train.steps=has no key", False)])
def test_only_an_unknown_name_is_answered_by_how_to_list_the_names(config, capsys, argument, listed):
    assert Command()("--config", config, argument) == 2
    assert (". To list the keys: --config" in the_error(capsys)) == listed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("def get_config(:", "SyntaxError"),
        ("x = unknown_name", "NameError: name 'unknown_name' is not defined (line 1)"),
        ("x = 1", "it defines no get_config()"),
        ("def get_config():\n    return {}['lost']", "KeyError: lost (line 2)"),
        ("def get_config():\n    return 5", "must return a ConfigDict"),
        ("def get_config():\n    raise ValueError('first\\nlast')", "last"),
    ],
)
@pytest.mark.parametrize("override", [[], ["--config.train.steps=3"]])
def test_mistakes_in_config_files_are_one_line(tmp_path, capsys, text, message, override):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    assert Command()(f"--config={path}", *override) == 2
    line = the_error(capsys)
    assert str(path) in line and message in line


def test_an_unknown_variant_lists_the_known(config, capsys):
    assert Command()("--config", f"{config}:tiyn") == 2
    assert the_error(capsys).endswith("unknown variant 'tiyn'; known: base, tiny\n")


def test_missing_flags_and_arguments_are_one_line(config, capsys):
    assert Command()("--workdir=x", required=("config", "workdir")) == 2
    assert "--config is missing" in the_error(capsys)
    assert Command()("--config", config, required=("config", "workdir")) == 2
    assert "--workdir is missing" in the_error(capsys)
    assert Command()("a.pth", positional=("SOURCE", "DIR")) == 2
    assert "got 1 arguments besides flags (a.pth), need SOURCE DIR" in the_error(capsys)


def test_positional_arguments_reach_main():
    command = Command()
    assert command("a.pth", "--mode=eval", "folder", positional=("SOURCE", "DIR")) == 0
    assert command.seen == ("a.pth", "folder")


@pytest.mark.parametrize("flag", ["-h", "--help", "--helpshort", "--helpfull"])
def test_help_lists_the_purpose_the_flags_and_the_keys(config, capsys, flag):
    assert Command()(flag, required=("config",)) == 0
    text = capsys.readouterr().out
    assert "Laws of the command line" in text and "--config.section.key=value" in text
    assert Command()("--config", config, "--config.train.steps=5", flag, required=("workdir",)) == 0
    text = capsys.readouterr().out
    assert "--config.train.steps=5\n" in text and "--config.model.cutoffs=1,2\n" in text
    assert "Residual at which a sample's forward solve stops." in text
    assert Command()("--config", config + ":tny", flag) == 2


def test_errors_of_main(capsys):
    def mistaken():
        raise UserError("two\nlines")

    def interrupted():
        raise KeyboardInterrupt

    def buggy():
        raise ZeroDivisionError

    assert Command(mistaken)() == 2
    assert the_error(capsys) == "error: two lines\n"
    assert Command(interrupted)() == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        cli.run(buggy, ["command"], flag_values=flags.FlagValues())


def test_with_json_stdout_or_a_file_holds_one_object(capsys, tmp_path):
    def talkative():
        print("step 1")
        return {"loss": 1 / 3, "worst": float("inf"), "files": ["a"]}

    def mistaken():
        raise UserError("two\nlines")

    assert Command(talkative)("--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": 1 / 3, "worst": None, "files": ["a"]} and err == "step 1\n"
    assert Command(talkative)() == 0
    assert capsys.readouterr().out == "step 1\n"
    assert Command(mistaken)("--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "two lines"} and err == "error: two lines\n"
    file = tmp_path / "result.json"
    assert Command(talkative)(f"--json={file}") == 0
    assert json.loads(file.read_text())["files"] == ["a"] and capsys.readouterr() == ("step 1\n", "")
    assert Command(mistaken)(f"--json={file}") == 2
    assert json.loads(file.read_text()) == {"error": "two lines"} and capsys.readouterr() == ("", "error: two lines\n")
    assert Command(talkative)(f"--json={tmp_path}/none/file") == 2
    assert the_error(capsys).endswith("there is no such folder\n")


def test_the_config_of_a_run_is_taken_where_none_is_given(config, capsys):
    command, other = Command(), resolve(runpy.run_path(config)["get_config"]().to_dict())
    runs = {"with": dataclasses.replace(other, train=dataclasses.replace(other.train, steps=77)), "without": None}
    of_run = ("workdir", runs.get)
    assert command("--workdir=with", "--config.model.pre_norm", of_run=of_run) == 0
    assert command.resolved.train.steps == 77 and command.resolved.model.pre_norm
    assert command("--workdir=with", "--config", config, of_run=of_run) == 0
    assert command.resolved.train.steps == 10
    capsys.readouterr()
    assert command("--workdir=without", of_run=of_run) == 0 and command.resolved is None
    assert command("--workdir=with", "--config.train.stepps=3", of_run=of_run) == 2
    assert the_error(capsys).endswith("did you mean 'steps'? To list the keys: --workdir with --help\n")
    assert command("--workdir=with", "--help", of_run=of_run) == 0
    assert "--config.train.steps=77\n" in capsys.readouterr().out


def test_require():
    cli.require(True, "fine")
    with pytest.raises(UserError, match="not fine"):
        cli.require(False, "not fine")


SCRIPT = '''"""Greets.

    python greet.py --name NAME
"""
from absl import flags
from deq_flax import cli

_CONFIG = cli.config_flag()
_NAME = flags.DEFINE_string("name", None, "whom to greet")


def main():
    print("hello", _NAME.value, cli.resolved().train.steps)


if __name__ == "__main__":
    cli.run(main, required=("config",))
'''


@pytest.mark.slow
def test_a_real_command(tmp_path, config):
    (tmp_path / "greet.py").write_text(SCRIPT)

    def greet(*arguments):
        command = [sys.executable, "-W", "ignore", str(tmp_path / "greet.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False)

    done = greet("--name=you", "--config", config, "--config.train.steps=4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello you 4\n", "")
    done = greet("--help")
    assert done.returncode == 0 and "--name         whom to greet" in done.stdout and "python greet.py" in done.stdout
    done = greet("--config", config, "--config.train.step=4")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"error: --config.train has no key 'step'; did you mean 'steps'? To list the keys: --config {config} --help\n"
    )


@pytest.mark.parametrize(
    ("redirect", "code", "words"),
    [
        ("> /dev/full", 2, "error: the machine refused something that this needs: No space left on device"),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_standard_streams_that_are_full_or_closed(tmp_path, config, redirect, code, words):
    (tmp_path / "greet.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "greet.py"), "--name=you", "--config", config]
    shell = ["/bin/sh", "-c", f'("$@" {redirect}); echo "code $?" >&2', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False)
    assert done.stderr.splitlines() == [*([words] if words else []), f"code {code}"]


@pytest.mark.parametrize(("reason", "printed"), [("Event loop is closed", False), ("lost", True)])
def test_uncatchable_exceptions_are_silent_only_after_failed_writes(capsys, config, monkeypatch, reason, printed):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored afterwards

    class Writer:
        def __del__(self):
            raise RuntimeError(reason)

    assert Command(lambda: Writer() and None)("--config", config) == 0
    assert (reason in capsys.readouterr().err) is printed


@pytest.mark.parametrize("number", [24, 27, 28, 122])
def test_limits_of_the_machine_are_one_line_and_other_errors_keep_their_traceback(capsys, config, number):
    def body():
        raise OSError(number, "refused", "somewhere")

    assert Command(body)("--config", config) == 2
    assert the_error(capsys).endswith("needs: refused (somewhere)\n")

    def bug():
        raise FileNotFoundError(2, "missing")

    with pytest.raises(FileNotFoundError):
        Command(bug)("--config", config)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 20 GiB"), "(Unable to allocate 20 GiB)"),
        (MemoryError(), "(no more could be allocated)"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 64 bytes"),
            "Out of memory allocating 64 bytes",
        ),
    ],
)
def test_for_want_of_memory_a_command_ends_in_one_line(capsys, error, words):
    def body():
        raise error

    assert Command(body)() == 2
    line = the_error(capsys)
    assert line.startswith("error: out of memory: take smaller batches") and words in line


def test_other_errors_of_jax_keep_their_traceback():
    def body():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.run(body, ["command"], flag_values=Command().values)
