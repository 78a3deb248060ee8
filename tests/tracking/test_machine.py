"""Energy if the machine measures it; memory; the rate of matrix products."""

import pytest
import torch

from posttrain.tracking.machine import EnergyMeter, describe_machine, measure_peak, memory_now


def rapl(folder, *packages):
    for number, (microjoules, wrap) in enumerate(packages):
        package = folder / f"intel-rapl:{number}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(f"{microjoules}\n")
        (package / "max_energy_range_uj").write_text(f"{wrap}\n")
        part = folder / f"intel-rapl:{number}:0"  # a part of the package, included in its counter
        part.mkdir(exist_ok=True)
        (part / "energy_uj").write_text("7\n")
        (part / "max_energy_range_uj").write_text("9\n")


def test_rapl_packages_are_summed_and_their_counters_wrap(tmp_path):
    rapl(tmp_path, (1_000_000, 10_000_000), (9_000_000, 10_000_000))
    meter = EnergyMeter(powercap=tmp_path)
    assert meter.source == "RAPL, 2 packages, whole machine"
    assert meter.joules() == 0
    rapl(tmp_path, (3_000_000, 10_000_000), (9_500_000, 10_000_000))
    assert meter.joules() == pytest.approx(2.5)
    rapl(tmp_path, (4_000_000, 10_000_000), (500_000, 10_000_000))  # the second counter has wrapped
    assert meter.joules() == pytest.approx(2.5 + 1 + 1)


def test_energy_is_none_without_a_counter(tmp_path):
    meter = EnergyMeter(powercap=tmp_path)
    assert (meter.joules(), meter.source) == (None, "")


def test_unreadable_counters_are_ignored(tmp_path):
    rapl(tmp_path, (1, 2))
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    assert EnergyMeter(powercap=tmp_path).joules() is None


def test_memory_now_grows_with_allocated_memory():
    before = memory_now()
    held = torch.ones(64 * 2**20 // 4)
    after = memory_now()
    assert after["memory/rss_gib"] - before["memory/rss_gib"] == pytest.approx(1 / 16, rel=0.3)
    assert after["memory/peak_rss_gib"] >= after["memory/rss_gib"]
    assert len(held)


def test_the_machine_is_described_and_its_peak_measured():
    found = describe_machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_gib"] > 0
    assert 1e9 < measure_peak(torch.device("cpu"), "float32") < 1e15
