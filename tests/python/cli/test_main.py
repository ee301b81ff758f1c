"""The command line itself."""

import subprocess
import sys

import pytest

import qlora_native
from qlora_native.cli.main import main


def test_info_lists_the_build(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    build = qlora_native.build_info()
    for value in (build["version"], build["cxx_compiler"], build["cpu_set"]):
        assert value in printed
    assert ("not built" in printed) == (not build["cuda"])
    if build["cuda"]:
        for line in build["cuda_devices"] + build["cuda_problems"]:
            assert line in printed


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "demo|train|merge|convert|info" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "train", "merge", "convert"])
@pytest.mark.parametrize("missing", [["transformers"], ["transformers", "safetensors", "tqdm"]])
def test_help_and_info_do_without_the_extra_packages(command, missing):
    """Without transformers help still works, and the command says what to install."""
    program = (
        "import sys\n"
        f"for name in {missing}: sys.modules[name] = None\n"
        "from qlora_native.cli.main import main\n"
        "assert main(['info']) == 0\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        f"sys.exit(main(['{command}'] + sys.argv[1:]))\n"
    )
    options = {
        "train": ["--model", "x", "--data", "x", "--output", "x"],
        "merge": ["--adapter", "x", "--model", "x", "--output", "x"],
        "convert": ["x", "y"],
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *options.get(command, [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'qlora_native[train]'" in done.stderr
    assert "Traceback" not in done.stderr
