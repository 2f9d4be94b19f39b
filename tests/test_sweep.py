"""A sweep tunes what its studies need and runs their data orders; its settings share the machine's slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_study import leave, of, short

from gnlib import executors, study
from gnlib import sweep as sweeping
from gnlib.config import ConfigError, RunConfig
from gnlib.estimate import cost
from gnlib.executors import Slots, StudyError, UnfinishedError
from gnlib.files import replacing
from gnlib.record import Record
from gnlib.studies import study_configs, study_runs
from gnlib.sweep import sweep
from gnlib.variants import Setting, key, tunable

pytestmark = pytest.mark.usefixtures("home")


class Calls:
    """In place of tuning and running: remembers the order, thread by thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.slots: set[int] = set()
        self.afresh: list[bool] = []
        self.lock = threading.Lock()
        monkeypatch.setattr(sweeping, "tune", self.tune)
        monkeypatch.setattr(sweeping, "run_study", self.run)
        self.failing = ""
        self.error: Exception = StudyError("AdamW failed\nand again")

    def tune(self, profile: str, setting: Setting, jobs: Slots, fresh: bool) -> dict[str, object]:
        time.sleep(0.01)
        assert tunable(setting) == setting
        with self.lock:
            self.events.append(("tune", key(profile, setting)))
            self.afresh.append(fresh)
            self.slots.add(id(jobs))
        if self.failing == key(profile, setting):
            raise self.error
        return {"settings": {"method.inner.lr": 0.1}, "interior": True, "trials": []}

    def run(
        self, configs: Sequence[RunConfig], profile: str, jobs: Slots, allow_run: bool, fresh: bool
    ) -> list[Record]:
        with self.lock:
            self.events += [("run", f"{config.method.inner.optimizer}@{config.outer_batch}") for config in configs]
            self.slots.add(id(jobs))
        return [of(config) for config in configs]


def test_every_setting_is_tuned_before_its_data_orders_run_and_a_method_before_its_other_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    sweep(["critical_batch_size"], "tiny", jobs=2, methods=["adamw", "muon"], seeds=[1, 2])
    assert sorted(calls.events) == sorted(
        [("tune", name) for name in ("adamw", "muon", "adamw@16", "muon@16")]
        + [("run", f"{name}@{batch}") for name in ("adamw", "muon") for batch in (16, 64) for _ in range(2)]
    )
    order = calls.events.index
    for name in ("adamw", "muon"):
        assert order(("run", f"{name}@64")) < order(("tune", f"{name}@16")) < order(("run", f"{name}@16"))
    assert len(calls.slots) == 1  # shared by all


@pytest.mark.parametrize(("first", "second"), [("adamw", "adamw@16"), ("adamw@16", "adamw@16:budget")])
def test_a_search_waits_for_the_one_that_it_starts_from(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: the second would have begun while the first goes on."""
    calls, begun, early = Calls(monkeypatch), threading.Event(), []

    def slow(profile: str, setting: Setting, jobs: Slots, fresh: bool) -> dict[str, object]:
        name = key(profile, setting)
        if name == second:
            begun.set()
        if name == first:
            early.append(begun.wait(0.3))
        return calls.tune(profile, setting, jobs, fresh)

    monkeypatch.setattr(sweeping, "tune", slow)
    sweep(["critical_batch_size", "fixed_budget"], "tiny", methods=["adamw"], seeds=[1])
    assert early == [False] and begun.is_set()


def test_a_tuned_variant_at_another_batch_waits_for_its_method_and_for_itself_at_the_profiles() -> None:
    """Its search starts from the rates that were tuned there (`variants.setting_config`)."""
    waits = sweeping._waits_for("laptop", [Setting("gauss_newton_no_search", 512)])
    assert waits == {"gauss_newton", "gauss_newton_no_search"}
    assert sweeping._waits_for("laptop", [Setting("gauss_newton_no_search")]) == {"gauss_newton"}
    assert sweeping._waits_for("h200", [Setting("adamw", 65536)]) == {"adamw", "adamw@16384"}


def test_variants_that_run_with_their_methods_settings_wait_for_its_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    sweep(["line_search"], "tiny", methods=["half_n", "search_on_all", "muon_averaged"], seeds=[1])
    assert sorted(calls.events) == [("run", "muon@64")] * 3 + [("tune", "gauss_newton"), ("tune", "muon")]


def test_what_is_interior_is_not_tuned_again_nor_anything_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "tuning", lambda profile, name: {"interior": name == "adamw"})
        sweep(["iteration_complexity"], "tiny", methods=["adamw", "muon"], seeds=[1])
    assert [name for what, name in calls.events if what == "tune"] == ["muon"]
    calls.events.clear()
    sweep(["iteration_complexity"], "tiny", methods=["adamw", "muon"], seeds=[1], tuned=False)
    assert {what for what, _ in calls.events} == {"run"}


def test_a_sweep_afresh_runs_what_is_only_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(sweeping, "run_study", lambda configs, profile, fresh, **_: asked.append(fresh))
    for fresh in (True, False):
        sweep(["iteration_complexity"], "tiny", methods=["adamw"], seeds=[1], tuned=False, fresh=fresh)
    assert asked == [True, False]


def test_a_sweep_afresh_tunes_without_what_is_only_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    for fresh in (True, False):
        sweep(["iteration_complexity"], "tiny", methods=["adamw"], seeds=[1], fresh=fresh)
    assert calls.afresh == [True, False]


def test_a_sweep_in_one_process_trains_one_run_at_a_time_and_none_once_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, most, trained = [0], [0], []

    def train(config: object, keep_weights: bool) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1
        trained.append(config)
        if len(trained) == 3:
            made[0].close()

    made: list[Slots] = []
    monkeypatch.setattr(sweeping, "Slots", lambda count: made.append(Slots(count)) or made[0])
    monkeypatch.setattr(executors, "train", train)
    monkeypatch.setenv("GNLIB_EXECUTOR", "inline")
    monkeypatch.setattr(sweeping, "run_study", lambda configs, profile, jobs, **_: executors.execute(configs, jobs))
    with pytest.raises(UnfinishedError, match=r"settings are left"):
        sweep(["critical_batch_size"], "tiny", jobs=3, tuned=False, seeds=[1])
    assert most[0] == 1 and len(trained) == 3


def test_runs_that_are_stopped_give_their_slots_back(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(2)

    class Process:
        returncode = None

        def poll(self) -> None:
            slots.close()

        def terminate(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(executors, "_spawn", lambda *_: Process())
    with pytest.raises(UnfinishedError):
        executors.execute([run.config for run in study_runs("iteration_complexity", "tiny", [1])], slots)
    assert {slots.take(1.0), slots.take(1.0)} == {0, 1}


def test_a_sweep_says_what_it_has_tuned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Calls(monkeypatch)
    sweep(["iteration_complexity"], "tiny", methods=["adamw"], seeds=[1])
    out, err = capsys.readouterr()
    assert "adamw: {'method.inner.lr': 0.1}, interior among 0 trials" in out and "1 settings" in err


def test_a_chain_that_fails_is_reported_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    calls.failing = "adamw"
    with pytest.raises(StudyError) as caught:
        sweep(["iteration_complexity"], "tiny", methods=["adamw", "muon"], seeds=[1])
    assert str(caught.value).splitlines() == ["adamw: AdamW failed", "adamw: and again"]
    assert ("run", "muon@64") in calls.events
    calls.error = OSError("no space left")
    with pytest.raises(StudyError, match="adamw: no space left"):
        sweep(["iteration_complexity"], "tiny", methods=["adamw", "muon"], seeds=[1])


@pytest.mark.parametrize("error", [StudyError("it failed"), ConfigError("it failed")])
def test_a_setting_goes_on_where_the_one_it_starts_from_has_failed(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    calls.failing, calls.error = "adamw", error
    with pytest.raises(StudyError, match=r"^adamw: it failed$"):
        sweep(["critical_batch_size"], "tiny", methods=["adamw"], seeds=[1])
    assert ("run", "adamw@16") in calls.events


def test_ctrl_c_closes_the_slots_so_that_no_chain_begins_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Slots] = []

    class Seen(Slots):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            made.append(self)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    Calls(monkeypatch)
    monkeypatch.setattr(sweeping, "Slots", Seen)
    monkeypatch.setattr(sweeping, "_problems", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(["iteration_complexity"], "tiny", jobs=1, methods=["adamw"], seeds=[1])
    assert [slots.closed for slots in made] == [True]


def test_only_the_batches_asked_for_are_run_and_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    sweep(["critical_batch_size"], "tiny", methods=["adamw"], seeds=[1], batches=[16])
    assert calls.events == [("tune", "adamw@16"), ("run", "adamw@16")]
    with pytest.raises(ConfigError, match="batches: 17; allowed: 16, 64"):
        sweep(["critical_batch_size"], "tiny", batches=[17])


def test_a_sweep_of_nothing_is_refused_with_the_studies_there_are() -> None:
    with pytest.raises(ConfigError, match="study: name at least one; allowed: iteration_complexity, critical"):
        sweep([], "tiny")


def test_no_more_runs_than_slots_are_under_way_over_all_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five that could run at once; they end when one is refused a slot and those with a slot are all under way."""
    running, most, taken, lock, refused = [0], [0], [0], threading.Lock(), threading.Event()
    take, given_up, works = Slots.take, time.monotonic() + 60, set()

    def observed(slots: Slots, work: float) -> int | None:
        with lock:
            works.add(work)
            slot = take(slots, work)
            taken[0] += slot is not None
            if slot is None and running[0] == taken[0]:
                refused.set()
        return slot

    class Process:
        returncode = 0

        def __init__(self) -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])

        def poll(self) -> int | None:
            if not refused.is_set() and time.monotonic() < given_up:
                return None
            with lock:
                running[0] -= 1
            return 0

    monkeypatch.setattr(Slots, "take", observed)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(executors, "_spawn", lambda *_: Process())
    monkeypatch.setattr(sweeping, "run_study", lambda configs, profile, jobs, **_: executors.execute(configs, jobs))
    sweep(["critical_batch_size"], "tiny", jobs=3, tuned=False, seeds=[1])
    assert refused.is_set() and most[0] == 3 and running[0] == 0
    assert works == {cost(run.config) for run in study_runs("critical_batch_size", "tiny", [1])}


def test_a_sweep_stops_after_its_minutes_and_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Process:
        returncode = None

        def poll(self) -> None:
            return None

        def terminate(self) -> None:
            ended.append("terminated")

        def wait(self) -> None:
            ended.append("waited for")

    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(executors, "_spawn", lambda *_: Process())
    monkeypatch.setattr(sweeping, "run_study", lambda configs, profile, jobs, **_: executors.execute(configs, jobs))
    with pytest.raises(UnfinishedError, match=r"^1 of 1 settings are left: adamw$"):
        sweep(["iteration_complexity"], "tiny", jobs=2, minutes=0.005, tuned=False, methods=["adamw"], seeds=[1, 2])
    assert ended == ["terminated"] * 2 + ["waited for"] * 2


def test_the_time_of_a_sweep_is_given_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []

    def timer(interval: float, close: object) -> threading.Timer:
        seconds.append(interval)
        return threading.Timer(1000, lambda: None)

    Calls(monkeypatch)
    monkeypatch.setattr(sweeping, "Timer", timer)
    sweep(["iteration_complexity"], "tiny", methods=["adamw"], seeds=[1], minutes=1.5)
    assert seconds == [90.0]


@pytest.mark.parametrize("minutes", [0.0, -5.0, float("nan")])
def test_a_sweep_without_time_is_refused(minutes: float) -> None:
    with pytest.raises(ConfigError, match=r"minutes: .*; more than 0"):
        sweep(["iteration_complexity"], "tiny", minutes=minutes)


def test_a_setting_that_failed_outweighs_one_that_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is an error, the second only needs another call."""

    def run(configs: Sequence[RunConfig], *_: object, **__: object) -> None:
        raise StudyError("it failed") if configs[0].method.inner.optimizer == "adamw" else UnfinishedError("stopped")

    monkeypatch.setattr(sweeping, "run_study", run)
    with pytest.raises(StudyError, match=r"^adamw: it failed$"):
        sweep(["iteration_complexity"], "tiny", jobs=2, tuned=False, methods=["adamw", "soap"], seeds=[1])
    with pytest.raises(UnfinishedError, match=r"^1 of 1 settings are left: soap$"):
        sweep(["iteration_complexity"], "tiny", jobs=2, tuned=False, methods=["soap"], seeds=[1])


def test_a_sweep_leaves_the_records_of_its_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    configs = study_configs("iteration_complexity", "tiny", methods=["muon"])
    assert study.find(configs, "tiny") == [None]
    sweep(["iteration_complexity"], "tiny", jobs=1, methods=["muon"], tuned=False)
    (record,) = study.find(configs, "tiny")
    assert record is not None and record.status == "finished"


def test_settings_that_share_a_start_train_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def execute(configs: Sequence[RunConfig], jobs: Slots, keep_weights: bool = False, executor: str = "") -> None:
        for config in configs:
            if keep_weights:
                started.append(config.run_id)
                time.sleep(0.05)  # for the other threads to come by
                (study.run_folder(config) / "weights.pt").parent.mkdir(parents=True)
                (study.run_folder(config) / "weights.pt").touch()
            else:
                leave(of(config))

    monkeypatch.setattr(study, "execute", execute)
    sweep(["critical_batch_size"], "tiny", jobs=2, seeds=[1], tuned=False)
    assert len(started) == 1


def test_a_run_that_cannot_be_launched_does_not_keep_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(executors, "_spawn", spawn)
    slots = Slots(1)
    with pytest.raises(OSError, match="no memory"):
        executors.execute([short("adamw")], slots)
    assert slots.take(1.0) == 0


def test_a_file_whose_writing_fails_stays_as_it_was_with_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), replacing(path) as temporary:
        write_half(temporary)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_threads_may_write_the_same_file(tmp_path: Path) -> None:
    """Each under a temporary name of its own; the last one to end stays."""
    both = threading.Barrier(2, timeout=10)

    def write(text: str) -> None:
        with replacing(tmp_path / "config.json") as temporary:
            temporary.write_text(text)
            both.wait()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, ["one", "two"]))
    assert (tmp_path / "config.json").read_text() in ("one", "two") and len(list(tmp_path.iterdir())) == 1
