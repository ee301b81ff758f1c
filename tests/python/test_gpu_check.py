"""benchmarks/gpu_check.sh with stubs for the tools: order, limits, skips, verdicts, exit status."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.sh"
STAGES = ["machine", "extension", "cpp-tests", "googletest", "pytest", "memcheck", "racecheck"]
STAGES += ["initcheck", "resources", "bench"]

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason=f"there is no {SCRIPT}"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash"),
]

# Each notes how it was called. They do what the script relies on, and no more.
STUBS = {
    "nvidia-smi": 'case "$*" in *compute_cap,*) echo "A GPU, 580.1, 9.0, 1 MiB" ;; '
    '*compute_cap*) echo "${FAKE_CAPABILITY:-9.0}" ;; *name*) echo "NVIDIA Fake 100" ;; esac',
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
        if [ "$2" = "${FAKE_SANITIZER_HANGS:-}" ]; then sleep 60; fi
        if [ "$2" = "${FAKE_UNSUPPORTED:-}" ]; then echo "Error: Device not supported."; exit 1; fi
        if [ "$2" = "${FAKE_RACE:-}" ]; then echo "1 hazard"; exit 9; fi
        echo "========= ERROR SUMMARY: 0 errors" """,
    "cuobjdump": "",
    "nvdisasm": "",
    "fake-python": """
        case "$*" in
          "-m pip install"*)
            [ -z "${FAKE_BUILD_FAILS:-}" ] || exit 1
            while [ "$1" != --target ]; do shift; done
            mkdir -p "$2/qlora_native" ;;
          *"torch sees no GPU"*) exit ${FAKE_TORCH_STATUS:-0} ;;
          "- "*) exit ${FAKE_IMPORT_STATUS:-0} ;;
          *cuda_resources.py*) printf 'title\\n---\\n| kernel |\\n' ;;
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
    assert limits[-1] > planned_bench(check) + 300
    names = ["cuda_nvidia_fake_100.json", "cuda_nvidia_fake_100.md", "cuda_resources.md"]
    assert sorted(p.name for p in check.out.iterdir()) == sorted(
        [*names, "gpu_check.json", "gpu_check.log"]
    )
    assert "bench        passed" in (check.out / "gpu_check.log").read_text()


def planned_bench(check: Check) -> int:
    check.run("--dry-run")
    return planned(check.text)["bench"]


def test_it_builds_for_the_cards_architecture_alone_and_without_a_network(check):
    for capability, architecture in (("9.0", "90a-real"), ("8.6", "86-real"), ("12.0", "120-real")):
        assert check.run(FAKE_CAPABILITY=capability) == 0, check.text
        install = next(c for c in reversed(check.calls("fake-python")) if "pip install" in c)
        assert f"QLORA_CUDA_ARCHS={architecture} " in install
        assert "--no-build-isolation --no-deps" in install
        configure = next(c for c in reversed(check.calls("cmake")) if "-S" in c)
        assert f"-DQLORA_CUDA_ARCHS={architecture}" in configure
        assert "-DQLORA_FETCH_GTEST=OFF" in configure


def test_it_only_ever_asks_the_card(check):
    check.run()
    calls = check.calls("nvidia-smi")
    assert calls
    assert all(re.search(r" --query-gpu=[\w,.]+$", call) for call in calls)
    # (A space before it: --query-gpu=… has no value of its own to confuse it with.)
    assert not re.search(r"nvidia-smi\b.*(-r|-pm|-lgc|-pl|--gpu-reset)\b", SCRIPT.read_text())


def test_without_a_gpu_nothing_is_tried_and_the_status_is_2(check):
    (check.bin / "nvidia-smi").unlink()
    if shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("the system has an nvidia-smi")
    assert check.run() == 2
    assert check.verdicts() == {"machine": "failed"}
    assert check.reason("machine") == "missing: nvidia-smi"


def test_a_torch_without_cuda_is_no_gpu(check):
    assert check.run(FAKE_TORCH_STATUS="1") == 2
    assert check.reason("machine") == "torch sees no GPU"


def test_a_build_that_fails_skips_what_needs_it_and_no_more(check):
    assert check.run(FAKE_BUILD_FAILS="1") == 1
    verdicts = check.verdicts()
    assert verdicts["extension"] == "failed"
    skipped = {name for name, verdict in verdicts.items() if verdict == "skipped"}
    assert skipped == {"pytest", "resources", "bench"}
    assert check.reason("bench") == "the extension was not built"
    assert verdicts["googletest"] == verdicts["memcheck"] == "passed"


def test_a_qlora_native_that_hides_the_one_built_is_a_failure(check):
    assert check.run(FAKE_IMPORT_STATUS="1") == 1
    assert "another qlora_native hides the one that was built" in check.reason("extension")
    assert check.verdicts()["bench"] == "skipped"


def test_without_googletest_its_stages_are_skipped_with_the_reason(check):
    assert check.run(FAKE_NO_GTEST="1") == 0, check.text
    verdicts = check.verdicts()
    skipped = {name for name, verdict in verdicts.items() if verdict == "skipped"}
    assert skipped == {"cpp-tests", "googletest", "memcheck", "racecheck", "initcheck"}
    assert check.reason("cpp-tests").startswith("there is no GoogleTest: neither of the system nor")
    assert check.reason("memcheck") == "qlora_cuda_tests was not built"


def test_without_its_tools_a_stage_is_skipped_with_the_reason(check):
    for name in ("compute-sanitizer", "cuobjdump"):
        if shutil.which(name, path="/usr/bin:/bin"):
            pytest.skip(f"the system has {name}")
        (check.bin / name).unlink()
    assert check.run() == 0, check.text
    assert check.reason("racecheck") == "there is no compute-sanitizer"
    assert check.reason("resources") == "there is no cuobjdump, or no nvdisasm"


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
    status = check.run(FAKE_SANITIZER_HANGS="memcheck", QLORA_GPU_CHECK_SECONDS="54")
    assert status == 1
    assert re.fullmatch(r"it did not end within \d+ s", check.reason("memcheck"))
    assert list(check.verdicts()) == STAGES
    assert time.monotonic() - start < 54


def test_only_files_with_gpu_tests_are_given_to_pytest(check):
    check.run()
    (call,) = (c for c in check.calls("fake-python") if "-m pytest" in c)
    assert "-m cuda" in call
    files = [word for word in call.split() if word.endswith(".py")]
    assert "tests/python/test_cuda_codec.py" in files
    assert "tests/python/test_layers.py" not in files
