"""benchmarks/on_device.py: what it says of parts that end in each possible way, and a run on small shapes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import device_checks  # noqa: E402
import on_device  # noqa: E402

CHECK = {"dtype": "float32", "name": "context", "error": 1e-7, "bound": 1e-5, "passed": True}
SPEED = {"tokens per second": 1234.0, "MFU": 0.5}
DEVICE = {"devices": 1, "device": "NVIDIA H100 80GB HBM3", "jax": "0.10.2", "platform": "gpu"}
DEVICE |= {"attention": {"flash": ["float32"]}, "experts": {"dense": ["float32"], "grouped": ["bfloat16"]}}
DEVICE |= {"loss": {"xla": ["float32"]}}


def result_of(*parts):
    return {"started": "2026-11-27T09:00:00+00:00", "device": DEVICE, "parts": list(parts)}


def done(name, result):
    return {"part": name, "status": "done", "seconds": 1.0, "result": result}


def test_a_row_says_what_passed_and_how_fast_it_was():
    result = result_of(done("check attention flash", {"checks": [CHECK]}), done("speed 12.0 151m", SPEED))
    heading, _, row, *_ = on_device.markdown(result).splitlines()
    assert heading == "| date | devices | JAX | checks passed | speed 151m |"
    assert row == "| 2026-11-27 | 1 x NVIDIA H100 80GB HBM3 | 0.10.2 | 1 of 1 | 1,234 tokens/s, MFU 50.0% |"
    assert on_device.failures(result) == []


def test_a_check_that_fails_or_does_not_end_is_a_failure_and_a_slow_step_is_not():
    off = CHECK | {"error": 0.1, "passed": False}
    late, refused = {"status": "out of time"}, {"status": "failed", "error": "model.d_model=3: no"}
    result = result_of(
        done("check attention flash", {"checks": [CHECK, off]}),
        {"part": "check experts grouped", **late},
        {"part": "speed 12.0 1b2", **refused},
    )
    assert on_device.failures(result) == [
        "check attention flash, float32, context: 0.1",
        "check experts grouped: out of time",
    ]
    assert "- speed 12.0 1b2: failed: model.d_model=3: no" in on_device.markdown(result)


@pytest.mark.parametrize("error", [math.nan, 2.0])
def test_an_error_that_is_no_number_fails(error):
    assert not device_checks.Check("x", error, 1.0).passed


def test_every_backend_of_a_device_is_checked_before_anything_is_timed():
    parts = list(on_device.first_parts(DEVICE, small=False, torch=True))
    items = [part.item for part in parts]
    assert items == sorted(items, key=lambda item: item != "check")
    assert [part.arguments for part in parts[:3]] == [
        ("attention", "flash", "float32"),
        ("experts", "grouped", "bfloat16"),
        ("loss", "xla", "float32"),
    ]
    assert sum(item == "torch" for item in items) == 2


def test_on_a_tpu_both_ways_of_the_loss_are_timed():
    parts = on_device.first_parts(DEVICE | {"platform": "tpu"}, small=False, torch=False)
    speeds = [part.arguments[1:] for part in parts if part.item == "speed"]
    assert on_device.LARGER in speeds
    assert (*on_device.LARGER, "train.loss_kernel=pallas") in speeds


def test_a_part_that_takes_too_long_is_ended_and_said(monkeypatch, tmp_path):
    slow = tmp_path / "item.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(on_device, "ITEM", slow)
    begin = time.monotonic()
    found = on_device.run_part(on_device.Part("speed", ("1",)), 0.3)
    assert (found["part"], found["status"]) == ("speed 1", "out of time")
    assert time.monotonic() - begin < 10


def test_what_a_part_says_last_is_its_result_or_its_error(monkeypatch, tmp_path):
    item = tmp_path / "item.py"
    monkeypatch.setattr(on_device, "ITEM", item)
    item.write_text("print('noise'); print('{\"a\": 1}')")
    assert on_device.run_part(on_device.Part("device"), 30)["result"] == {"a": 1}
    item.write_text("import sys; sys.exit('error: no room')")
    found = on_device.run_part(on_device.Part("device"), 30)
    assert (found["status"], found["error"]) == ("failed", "no room")


def test_what_is_known_is_written_after_each_part(monkeypatch, tmp_path):
    out, written = tmp_path / "result.json", []

    def run(part, seconds):
        if out.exists():
            written.append(len(json.loads(out.read_text())["parts"]))
        return done(part.name, DEVICE if part.item == "device" else {"checks": [CHECK]} | SPEED)

    monkeypatch.setattr(on_device, "run_part", run)
    result = on_device.measure(out, minutes=8, small=True, torch=False)
    assert written == [1, 2, 3, 4]
    assert json.loads(out.read_text()) == result
    assert out.with_suffix(".md").read_text() == on_device.markdown(result) + "\n"


@pytest.mark.slow
def test_a_run_on_small_shapes(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks/on_device.py"), "--small", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(out.read_text())
    assert [part["status"] for part in result["parts"]] == ["done"] * len(result["parts"])
    checks = [check for part in result["parts"] for check in part["result"].get("checks", [])]
    assert {check["dtype"] for check in checks} == {"float32", "bfloat16"}
    assert result["parts"][-1]["result"]["tokens per second"] > 0
