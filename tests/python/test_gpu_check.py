"""benchmarks/gpu_check.sh with stubs for the tools: order, limits, skips, verdicts, exit status."""

import ast
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
STAGES = ["machine", "extension", "small-cases", "pytest", "bench", "cpp-tests", "googletest"]
STAGES += ["memcheck", "racecheck", "initcheck", "resources"]
SANITIZERS = {"memcheck", "racecheck", "initcheck"}

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason=f"there is no {SCRIPT}"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash"),
]

# Each notes how it was called. They do what the script relies on, and no more.
STUBS = {
    "nvidia-smi": 'echo "A GPU, 580.1, 1 MiB"',
    "nvcc": "echo release 13.0",
    "ninja": "",
    "cmake": """
        if [ "$1" = --build ]; then
          mkdir -p "$2/tests/cpp/cuda"
          cp "$(dirname "$0")/device-tests" "$2/tests/cpp/cuda/qlora_cuda_tests"
        elif [ -n "${FAKE_NO_GTEST:-}" ]; then
          echo "GoogleTest is not available: the system has none"; exit 1
        fi""",
    "device-tests": "echo tests of the device ran; exit ${FAKE_GTEST_STATUS:-0}",
    "compute-sanitizer": """
        echo "caching: ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}" >>"$(dirname "$0")/../caching"
        if [ "$2" = "${FAKE_SANITIZER_HANGS:-}" ]; then sleep 60; fi
        if [ "$2" = "${FAKE_UNSUPPORTED:-}" ]; then echo "Error: Device not supported."; exit 1; fi
        if [ "$2" = "${FAKE_RACE:-}" ]; then echo "1 hazard"; exit 9; fi
        echo "========= ERROR SUMMARY: 0 errors" """,
    "fake-python": """
        case "$*" in
          "-m pip install"*)
            [ -z "${FAKE_BUILD_FAILS:-}" ] || exit 1
            while [ "$1" != --target ]; do shift; done
            mkdir -p "$2/qlora_native" ;;
          -)
            [ -z "${FAKE_NO_GPU:-}" ] || { echo "torch sees no GPU" >&2; exit 1; }
            printf 'name: NVIDIA Fake 100\\narchitecture: %s\\n' "${FAKE_ARCHITECTURE:-90a-real}" ;;
          "- "*) exit ${FAKE_IMPORT_STATUS:-0} ;;
          "-m pytest"*)
            [ -z "${FAKE_PYTEST_HANGS:-}" ] || {
              trap 'echo "1 failed, 2 passed"; kill $!; exit 2' INT
              sleep 60 & wait
            } ;;
          *cuda_resources.py*)
            [ -z "${FAKE_NO_DISASSEMBLER:-}" ] || { echo "nvdisasm is missing" >&2; exit 77; }
            printf '| header |\\n|---|\\n| kernel |\\n' ;;
          *cuda_small_cases.py*) exit ${FAKE_SMALL_CASES_STATUS:-0} ;;
          *--markdown*) echo "| a table |" ;;
          *bench_cuda.py*)
            while [ "$1" != --json ]; do shift; done
            echo '{}' >"$2"; exit ${FAKE_BENCH_STATUS:-0} ;;
        esac""",
}


class Check:
    """A run of the script among stubs: what it printed, the verdicts, and who was called how."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.out = folder, folder / "bin", folder / "out"
        self.calls_file = folder / "calls"
        self.bin.mkdir()
        for name, body in STUBS.items():
            self.add_stub(name, body)

    def add_stub(self, name: str, body: str) -> None:
        stub = self.bin / name
        stub.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{self.calls_file}"\n{body}\n')
        stub.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> int:
        # Only the stubs and the system's basic tools: a real toolkit must not be found.
        system = "/usr/bin:/bin"
        done = subprocess.run(
            ["bash", str(SCRIPT), *(arguments or [str(self.out)])],
            env={
                "PATH": f"{self.bin}:{system}",
                "HOME": str(self.folder),
                "CUDA_HOME": str(self.folder / "no_toolkit"),
                "PYTHON": "fake-python",
                "QLORA_GPU_CHECK_BUILD": str(self.folder / "build"),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        self.text = done.stdout
        return done.returncode

    def report(self) -> dict:
        return json.loads((self.out / "gpu_check.json").read_text())

    def verdicts(self) -> dict[str, str]:
        return {stage["stage"]: stage["verdict"] for stage in self.report()["stages"]}

    def reason(self, name: str) -> str:
        return next(s["reason"] for s in self.report()["stages"] if s["stage"] == name)

    def calls(self, tool: str) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line.split()[0] == tool]


@pytest.fixture
def check(tmp_path) -> Check:
    return Check(tmp_path)


def planned(text: str) -> dict[str, int]:
    return {name: int(s) for name, s in re.findall(r"^(\S+) +(\d+) s  ", text, re.MULTILINE)}


def test_the_plan_has_all_stages_and_keeps_to_nine_minutes(check):
    assert check.run("--dry-run") == 0
    plan = planned(check.text)
    assert list(plan) == STAGES
    total, reserved = map(int, re.match(r"at most (\d+) s, (\d+) s", check.text).groups())
    assert total == 540
    assert sum(plan.values()) + reserved <= total
    assert plan["pytest"] >= 150
    assert check.calls("nvidia-smi") == []


@pytest.mark.parametrize("arguments", [["--wet-run"], ["a", "b"]])
def test_wrong_arguments_are_refused(check, arguments):
    assert check.run(*arguments) == 2
    assert "usage:" in check.text


def test_where_all_is_well_every_stage_passes_in_order(check):
    assert check.run() == 0, check.text
    assert check.verdicts() == dict.fromkeys(STAGES, "passed")
    limits = [int(n) for n in re.findall(r"^==== \S+ \(at most (\d+) s", check.text, re.MULTILINE)]
    assert len(limits) == len(STAGES)
    assert all(limit <= 530 for limit in limits)
    # What the stages before it did not use is the last one's.
    assert limits[-1] > 400
    names = ["cuda_nvidia_fake_100.json", "cuda_nvidia_fake_100.md", "cuda_resources.md"]
    assert sorted(p.name for p in check.out.iterdir()) == sorted(
        [*names, "gpu_check.json", "gpu_check.log", *(f"{name}.log" for name in SANITIZERS)]
    )
    assert "bench        passed" in (check.out / "gpu_check.log").read_text()


def test_it_builds_for_the_cards_architecture_alone_and_without_a_network(check):
    for architecture in ("90a-real", "86-real", "120-real"):
        assert check.run(FAKE_ARCHITECTURE=architecture) == 0, check.text
        install = next(c for c in reversed(check.calls("fake-python")) if "pip install" in c)
        assert f"QLORA_CUDA_ARCHS={architecture} " in install
        assert "--no-build-isolation --no-deps" in install


def test_the_library_is_compiled_once_for_the_extension_and_the_cpp_tests(check):
    assert check.run() == 0, check.text
    (install,) = (c for c in check.calls("fake-python") if "pip install" in c)
    folder = re.search(r"build-dir=(\S+)", install)[1]
    configure, build = check.calls("cmake")
    assert f"-B {folder} " in configure
    assert "-DQLORA_FETCH_GTEST=OFF" in configure
    assert f"--build {folder} --target qlora_cuda_tests" in build
    # Else the next run, in the same folder, would build all tests with the extension.
    assert "-DQLORA_BUILD_TESTS=ON" in configure
    assert "define.QLORA_BUILD_TESTS=OFF" in install


def test_it_only_ever_asks_the_card(check):
    check.run()
    calls = check.calls("nvidia-smi")
    assert calls
    assert all(re.search(r" --query-gpu=[\w,.]+$", call) for call in calls)
    # (A space before it: --query-gpu=… has no value of its own to confuse it with.)
    assert not re.search(r"nvidia-smi\b.*(-r|-pm|-lgc|-pl|--gpu-reset)\b", SCRIPT.read_text())


def test_without_a_gpu_nothing_is_tried_and_the_status_is_2(check):
    assert check.run(FAKE_NO_GPU="1") == 2
    assert check.verdicts() == {"machine": "failed"}
    assert check.reason("machine") == "torch sees no GPU"


def test_a_tool_that_must_be_there_is_named(check):
    (check.bin / "nvcc").unlink()
    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("the system has an nvcc")
    assert check.run() == 2
    assert check.reason("machine") == "missing: nvcc"


def test_a_build_that_fails_skips_what_needs_it_and_no_more(check):
    assert check.run(FAKE_BUILD_FAILS="1") == 1
    verdicts = check.verdicts()
    assert verdicts["extension"] == "failed"
    skipped = {name for name, verdict in verdicts.items() if verdict == "skipped"}
    assert skipped == set(STAGES) - {"machine", "extension"}
    assert check.reason("bench") == "the extension was not built"


def test_a_qlora_native_that_hides_the_one_built_is_a_failure(check):
    assert check.run(FAKE_IMPORT_STATUS="1") == 1
    assert "another qlora_native hides the one that was built" in check.reason("extension")
    assert check.verdicts()["bench"] == "skipped"


def skipped_stages(check: Check) -> set[str]:
    return {name for name, verdict in check.verdicts().items() if verdict == "skipped"}


def test_without_googletest_the_sanitizers_still_see_every_operation(check):
    assert check.run(FAKE_NO_GTEST="1") == 0, check.text
    assert skipped_stages(check) == {"cpp-tests", "googletest"}
    assert check.reason("cpp-tests").startswith("there is no GoogleTest: neither of the system nor")
    calls = check.calls("compute-sanitizer")
    assert {re.search(r"--tool (\w+)", call)[1] for call in calls} == SANITIZERS
    for call in calls:
        assert "--target-processes all --error-exitcode 9" in call
        assert call.endswith("fake-python tests/python/cuda_small_cases.py")
    # torch's own pool would hide what is beyond a tensor.
    assert set((check.folder / "caching").read_text().splitlines()) == {"caching: 1"}


def test_without_a_sanitizer_the_summary_says_what_was_not_checked(check):
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin"):
        pytest.skip("the system has compute-sanitizer")
    (check.bin / "compute-sanitizer").unlink()
    assert check.run() == 0, check.text
    assert skipped_stages(check) == SANITIZERS
    for name in SANITIZERS:
        assert f"NOT CHECKED: {name} (there is no compute-sanitizer)" in check.text.splitlines()


def test_a_sanitizer_that_only_the_toolkit_has_is_found(check):
    (check.folder / "toolkit" / "bin").mkdir(parents=True)
    tool = check.bin / "compute-sanitizer"
    tool.rename(check.folder / "toolkit" / "bin" / tool.name)
    assert check.run(CUDA_HOME=str(check.folder / "toolkit")) == 0, check.text
    assert skipped_stages(check) == set()


def test_whether_there_is_a_disassembler_is_for_its_script_to_say(check):
    assert check.run(FAKE_NO_DISASSEMBLER="1") == 0, check.text
    assert check.reason("resources") == "nvdisasm is missing"
    assert not (check.out / "cuda_resources.md").exists()
    assert check.run() == 0
    assert "| header |\n|---|\n| kernel |\n" in check.text


def test_a_device_that_the_sanitizer_does_not_know_is_no_failure(check):
    assert check.run(FAKE_UNSUPPORTED="racecheck") == 0, check.text
    assert check.verdicts()["racecheck"] == "skipped"
    assert "does not support" in check.reason("racecheck")


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ({"FAKE_GTEST_STATUS": "1"}, "googletest"),
        ({"FAKE_RACE": "racecheck"}, "racecheck"),
        ({"FAKE_BENCH_STATUS": "1"}, "bench"),
        ({"FAKE_SMALL_CASES_STATUS": "1"}, "small-cases"),
    ],
)
def test_a_stage_that_fails_does_not_stop_the_others_and_the_status_is_1(check, fault, stage):
    assert check.run(**fault) == 1
    verdicts = check.verdicts()
    assert list(verdicts) == STAGES
    assert [name for name, verdict in verdicts.items() if verdict == "failed"] == [stage]
    assert re.search(rf"^{stage} +failed", check.text, re.MULTILINE)
    assert (check.out / "cuda_nvidia_fake_100.md").read_text() == "| a table |\n"


@pytest.mark.slow
def test_a_stage_that_does_not_end_is_ended(check):
    start = time.monotonic()
    status = check.run(FAKE_SANITIZER_HANGS="memcheck", QLORA_GPU_CHECK_SECONDS="36")
    assert status == 1
    assert re.fullmatch(r"it did not end within \d+ s", check.reason("memcheck"))
    assert list(check.verdicts()) == STAGES
    assert time.monotonic() - start < 46  # and the ten seconds that it may take to end


@pytest.mark.slow
def test_pytest_out_of_time_is_interrupted_and_says_what_it_found(check):
    assert check.run(FAKE_PYTEST_HANGS="1", QLORA_GPU_CHECK_SECONDS="27") == 1
    assert re.fullmatch(r"it did not end within \d+ s", check.reason("pytest"))
    assert "1 failed, 2 passed" in check.text


# ---- what it gives to pytest


@pytest.fixture(scope="module")
def pytest_call(tmp_path_factory) -> str:
    check = Check(tmp_path_factory.mktemp("check"))
    assert check.run() == 0, check.text
    (call,) = (c for c in check.calls("fake-python") if "-m pytest" in c)
    return call


def test_pytest_runs_what_needs_a_gpu_and_is_not_slow(pytest_call):
    assert "-m cuda and not slow " in pytest_call
    assert "--continue-on-collection-errors" in pytest_call
    assert re.search(r"--junitxml=\S+/out/pytest.xml ", pytest_call)
    files = [word for word in pytest_call.split() if word.endswith(".py")]
    assert "tests/python/test_cuda_codec.py" in files
    assert "tests/python/cli/test_cuda_train.py" in files
    assert "tests/python/test_layers.py" not in files


def imported_at_the_top(file: Path) -> set[str]:
    """The packages without which a file cannot be imported."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_what_it_gives_to_pytest_imports_nothing_that_a_gpu_machine_may_lack(pytest_call):
    files = [ROOT / word for word in pytest_call.split() if word.endswith(".py")]
    conftests = [ROOT / "tests/python/conftest.py", ROOT / "tests/python/cli/conftest.py"]
    to_do, seen = [*files, *conftests, ROOT / "tests/python/cuda_small_cases.py"], set()
    while to_do:
        file = to_do.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported_at_the_top(file):
            beside = [folder / f"{name}.py" for folder in (file.parent, ROOT / "tests/python")]
            own = [path for path in beside if path.exists()]
            to_do += own[:1]
            known = own or name in {"torch", "pytest", "qlora_native"} | sys.stdlib_module_names
            assert known, f"{file} imports {name}: want pytest.importorskip({name!r})"
