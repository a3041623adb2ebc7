"""Claims: rules on a made-up store with known answers, and every claim of the five papers on the real one."""

import json
from functools import cache

import numpy as np
import pandas as pd
import pytest

from defectbook.core import DataError, ParameterError, Prediction, Sample
from defectbook.data.datasets import Dataset
from defectbook.metrics.published import PAPERS
from defectbook.practice import claims as module
from defectbook.practice.claims import (
    VERDICTS,
    Claim,
    Finding,
    Reader,
    by_sets,
    cell,
    claims_html,
    follows,
    judge_above,
    judge_claims,
    judge_kept,
    judge_small,
    over_images,
    over_seeds,
    set_words,
    stating,
    verdict_of,
    within,
)
from defectbook.practice.paper_claims import CLAIMS, PAGE_LINES, RESULT_PAGES, beside_html, claims_of, page_opening, published_beside, telling_images
from defectbook.practice.protocol import Run
from defectbook.practice.runs import RunStore, provenance

RNG = np.random.default_rng(0)
DICE = RNG.uniform(0.3, 0.6, 60)
made = cache(lambda preset: provenance("cpu", preset, {}))  # asks git, which takes a while


def put(store, dataset, method, seed, value, dice=DICE, preset="small", names=None, metric="aupro"):
    shown = {"preset": preset, "dataset": dataset, "category": "all", "method": method, "seed": seed}
    metrics = pd.DataFrame([(dataset, "all", method, seed, metric, value)], columns=["dataset", "category", "method", "seed", "metric", "value"])
    nothing = [Sample(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), 0, "none", mask_threshold=None)]
    run = Run(
        Dataset(dataset, "all", ".", [], [], nothing), method, seed, metrics, Prediction([np.zeros((1, 1), np.float32)], np.zeros(1)), 0.5, (0.0, 1.0)
    )
    table = pd.DataFrame({"name": names or [f"{number:03}" for number in range(len(dice))], "dice": dice})
    return store.save("made_up", shown, shown, run, made(preset), [], {"images": table})


def make_stale(run):
    path = run.folder / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "library": "0" * 16}))


@pytest.fixture
def store(tmp_path):
    """Boards gain 5 points in each seed, tiles lose 4, DeepPCB is noise."""
    store = RunStore(tmp_path / "store")
    for seed in range(3):
        level = 0.80 + 0.02 * seed
        for dataset, gain in (("pcb", 0.05), ("magnetic_tile", -0.04), ("deeppcb", (0.03, -0.04, 0.02)[seed])):
            put(store, dataset, "old", seed, level)
            put(store, dataset, "new", seed, level + gain + 0.001 * seed, DICE + gain)
    put(store, "pcb", "new", 0, 0.1, preset="smoke")
    return store


def look(reader, *sets, metric="aupro"):
    return [
        over_seeds(reader, name, *(reader.find("made_up", dataset=name, method=method) for method in ("new", "old")), metric, margin=0.05)
        for name in sets
    ]


def judged(store, *sets, **options):
    claim = Claim("one", "PNI", "Table 9", "The new one is better", "By seed", lambda reader: look(reader, *sets), ("71_pni",))
    return judge_claims([claim], Reader(store, **options)).iloc[0]


@pytest.mark.parametrize(
    ("sets", "verdict"),
    [
        (("pcb",), "reproduced"),
        (("magnetic_tile",), "not"),
        (("pcb", "magnetic_tile"), "partly"),
        (("deeppcb",), "not decidable here"),
        (("pcb", "deeppcb"), "partly"),
        (("magnetic_tile", "deeppcb"), "not"),
        (("visa",), "not decidable here"),
        (("pcb", "visa"), "partly"),
        (("magnetic_tile", "visa"), "not"),
    ],
)
def test_known_answers(store, sets, verdict):
    assert judged(store, *sets).verdict == verdict


def test_a_row_says_what_it_rests_on(store):
    row = judged(store, "pcb", "magnetic_tile", "visa")
    assert row.preset == "small" and row["set"] == "boards (simulated); magnetic tiles (real)"
    assert len(row.runs.split()) == 12 and {len(run) for run in row.runs.split()} == {6}
    assert row.ours.split("; ")[:2] == ["5.10", "-3.90"] and row.ours.endswith("-") and row.interval.count("[") == 2
    assert (
        "no run of made_up with dataset visa, method new" in row.why
        and "Holds: pcb +5.10" in row.why
        and "does not hold: magnetic_tile" in row.why.lower()
    )


def test_stale_runs_are_left_out_and_named(store):
    reader = Reader(store)
    runs = reader.find("made_up", dataset="pcb", method="new").runs
    for run in runs:
        make_stale(run)
    row = judged(store, "pcb")
    assert row.verdict == "not decidable here" and all(run.id in row.why for run in runs) and row.runs == "-"
    careful = Reader(store)
    careful.find("made_up")
    assert sorted(careful.skipped["made_up"]) == sorted(run.id for run in runs)
    assert judged(store, "pcb", stale=True).verdict == "reproduced"


def test_only_runs_of_the_preset_count(store):
    assert len(Reader(store).find("made_up", dataset="pcb", method="new").runs) == 3
    assert [run.value("aupro") for run in Reader(store, preset="smoke").find("made_up").runs] == [0.1]
    assert judged(store, "pcb", preset="paper").verdict == "not decidable here"


def test_simulated_is_said_and_nothing_unknown_is_called_real(store):
    assert set_words("pcb") == "boards (simulated)" and set_words("elpv", "mono") == "solar cells, mono (real)"
    assert "(simulated)" in set_words("new_simulated_set") and "real" not in set_words("some_folder")


def test_a_store_is_read_once(store, monkeypatch):
    reader = Reader(store)
    look(reader, "pcb")
    monkeypatch.setattr(RunStore, "runs", lambda *_: pytest.fail("read again"))
    assert look(reader, "pcb", "magnetic_tile")[0].outcome == "yes"


def test_one_training_leaves_a_question_open_unless_the_rule_says_otherwise(tmp_path):
    store = RunStore(tmp_path)
    for method, value in (("old", 0.5), ("new", 0.9)):
        put(store, "pcb", method, 0, value)
    reader = Reader(store)
    rows = [reader.find("made_up", method=method) for method in ("new", "old")]
    outcomes = [over_seeds(reader, "x", *rows, "aupro", margin=0.05, **more).outcome for more in ({}, {"alone": True}, {"alone": True, "sense": -1})]
    assert outcomes == ["open", "yes", "no"]


def test_no_room_for_a_gain_is_open(tmp_path):
    store = RunStore(tmp_path)
    for seed in range(2):
        put(store, "pcb", "old", seed, 1.0), put(store, "pcb", "new", seed, 1.0)
    assert [one.outcome for one in look(Reader(store), "pcb")] == ["open"] and "no room" in look(Reader(store), "pcb")[0].text


def test_seeds_that_do_not_meet_are_missing(tmp_path):
    store = RunStore(tmp_path)
    put(store, "pcb", "old", 0, 0.5), put(store, "pcb", "new", 1, 0.9)
    assert look(Reader(store), "pcb")[0].outcome == "missing"


def test_images_are_paired_and_have_to_be_the_same(store, tmp_path):
    reader = Reader(store)
    rows = {name: [reader.find("made_up", dataset=name, method=method) for method in ("new", "old")] for name in ("pcb", "magnetic_tile")}
    gain = over_images(reader, "Dice", *rows["pcb"])
    assert gain.outcome == "yes" and gain.value == pytest.approx(5) and gain.low == pytest.approx(gain.high)  # every image gains the same
    assert over_images(reader, "Dice", *rows["magnetic_tile"]).outcome == "no"
    other = RunStore(tmp_path / "other")
    put(other, "pcb", "old", 0, 0.5), put(other, "pcb", "new", 0, 0.5, names=[f"b{number}" for number in range(len(DICE))])
    reader = Reader(other)
    with pytest.raises(DataError, match="different images"):
        over_images(reader, "Dice", *(reader.find("made_up", method=method) for method in ("new", "old")))
    with pytest.raises(DataError, match="no column 'iou'"):
        over_images(reader, "IoU", *(reader.find("made_up", method=method) for method in ("new", "old")), "iou")


def test_over_sets_the_interval_is_over_sets(store):
    reader = Reader(store)
    pairs = [tuple(reader.find("made_up", dataset=name, method=method) for method in ("new", "old")) for name in ("pcb", "magnetic_tile", "visa")]
    found = by_sets(reader, "all", pairs, "aupro", margin=0.05)
    assert found.outcome == "open" and "1 of 2 sets" in found.text and found.low < 0 < found.high
    assert by_sets(reader, "all", pairs[2:], "aupro", margin=0.05).outcome == "missing"


@pytest.mark.parametrize(
    ("judge", "cases"),
    [
        (
            judge_above,
            {
                (1, 0.5, 2): "yes",
                (1, -0.5, 2): "open",
                (0.04, 0.01, 0.2): "open",
                (0.01, 0.005, 0.02): "no",
                (-1, -2, -0.5): "no",
                (1, None, None): "yes",
                (0.04, None, None): "no",
            },
        ),
        (judge_small, {(0.01, -0.04, 0.04): "yes", (1, 0.5, 2): "no", (-1, -2, -0.5): "no", (0.01, -1, 1): "open", (0.01, None, None): "yes"}),
        (judge_kept, {(1, 0.5, 2): "yes", (0, -0.04, 1): "yes", (-1, -2, -0.5): "no", (0, -1, 1): "open", (-1, None, None): "no"}),
    ],
)
def test_judges(judge, cases):
    for (value, low, high), outcome in cases.items():
        assert judge(value, low, high, 0.05) == outcome, (value, low, high)


def test_more_findings_never_turn_a_failure_into_a_success():
    finding = {outcome: Finding("x", outcome) for outcome in ("yes", "no", "open", "missing")}
    order = {verdict: place for place, verdict in enumerate(VERDICTS)}
    for base in (["yes"], ["yes", "yes"], ["yes", "open"]):
        worse = [finding[one] for one in (*base, "no")]
        assert order[verdict_of(worse)] >= order[verdict_of([finding[one] for one in base])]
    assert verdict_of([finding["missing"]]) == verdict_of([finding["open"]]) == "not decidable here"


def test_bad_input_is_named():
    with pytest.raises(ParameterError, match="PNI"):
        Claim("x", "PIN", "Table 1", "text", "rule", lambda reader: [])
    with pytest.raises(ParameterError, match="paper"):
        claims_of("PATCHCORE")
    with pytest.raises(ParameterError, match="results page"):
        claims_of(page="99_nothing")
    with pytest.raises(ParameterError, match="results page"):
        published_beside("99_nothing", Reader(RunStore("nothing")))
    with pytest.raises(ParameterError, match="outcome"):
        Finding("x", "maybe")
    with pytest.raises(DataError, match="0 published cells"):
        cell("PNI", "3", row="NPQ")
    with pytest.raises(DataError, match="looked at nothing"):
        judge_claims([Claim("x", "PNI", "Table 1", "text", "rule", lambda reader: [])], Reader(RunStore("nothing")))


def test_printed_figures_that_do_not_follow_are_found():
    outcome = {one.text.partition(",")[0]: one.outcome for one in follows("FOIL", "3.6", "class_weight")}
    assert outcome["ICF Cavity"] == "no" and outcome["ISCF Cavity"] == "yes"


def test_within_and_statements():
    assert within("x", 98.0, 96.3, 2, "%").outcome == "yes" and within("x", 98.4, 96.3, 2, "%").outcome == "no"
    into: list[Claim] = []
    stating(into, "PNI", "71_pni")("name", "Table 1", "text", "rule", "70_patchcore_elpv")(lambda reader: [Finding("x", "yes")])
    assert into[0].pages == ("71_pni", "70_patchcore_elpv")


def test_html_escapes_and_unfolds(store):
    claim = Claim("one", "PNI", "Table <9>", "A < B & C", "By seed", lambda reader: look(reader, "pcb"), ("71_pni",))
    html = claims_html(judge_claims([claim], Reader(store)), {"71_pni": "71_pni.html"})
    assert "A &lt; B &amp; C" in html and "<9>" not in html and 'href="71_pni.html"' in html and "<details>" in html and "overflow-x:auto" in html


# On the real store


@pytest.fixture(scope="module")
def verdicts():
    return {stale: judge_claims(CLAIMS, Reader(stale=stale)) for stale in (False, True)}


def test_every_claim_is_decided_and_names_its_runs(verdicts):
    for table in verdicts.values():
        assert list(table.name) == [claim.name for claim in CLAIMS] and table.verdict.isin(VERDICTS).all() and set(table.paper) == set(PAPERS)
        for row in table.itertuples():
            assert row.rule and row.claim and row.place and row.why
            for finding in row.findings:
                assert finding.runs or finding.value is None or finding.unit == "", f"{row.name}: {finding.text} has a figure and no run"
                assert finding.outcome != "missing" or not finding.runs


def test_the_store_of_the_book_decides_most_claims(verdicts):
    counts = verdicts[True].verdict.value_counts()
    assert set(counts.index) == set(VERDICTS) and counts["not decidable here"] < len(CLAIMS) / 4


def test_all_sets_of_the_book_are_known_as_real_or_simulated(verdicts):
    for table in verdicts.values():
        assert not table["set"].str.contains("unknown origin").any()


def test_verdicts_do_not_depend_on_the_order_of_claims(verdicts):
    some = [claim for claim in CLAIMS if claim.paper in ("PAEDID", "PROS")][::-1]
    again = judge_claims(some, Reader()).set_index("name").verdict
    assert (again == verdicts[False].set_index("name").verdict[again.index]).all()


def test_every_claim_has_a_page_and_every_page_its_lines():
    assert set(PAGE_LINES) == set(RESULT_PAGES) and all(claim.pages for claim in CLAIMS) and len({claim.name for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("page", RESULT_PAGES)
def test_side_by_side(page, tmp_path):
    table, empty = published_beside(page, Reader()), published_beside(page, Reader(RunStore(tmp_path)))
    assert len(table) and (table.ne("").all().all())
    assert (table.ours.eq("-") == table.runs.eq("-")).all() and (table.difference.ne("-") <= (table.ours.ne("-") & table.published.ne("-"))).all()
    assert empty.ours.eq("-").all() and empty.interval.eq("-").all() and empty.preset.eq("-").all()
    if page == "72_paedid":
        row = table.set_index("figure").loc["PAEDID, solar cells, Dice"]
        assert row.published == "62.20" and float(row.difference) == pytest.approx(float(row.ours) - 62.2, abs=0.011) and "simulated" in row["set"]
    assert beside_html(table).count("<tr>") == len(table) + 1


def test_a_page_opens_without_runs(tmp_path):
    html = page_opening("74_adaptation", Reader(RunStore(tmp_path)))
    assert "not decidable here" in html and "reproduced" not in html.replace("reproduced here", "") and "HQ-SAM" in html


def test_module_says_what_outcomes_mean():
    assert set(module._OUTCOME_MARKS) == set(module.OUTCOMES) and set(module.MARKS) == set(VERDICTS)


def test_telling_images_are_chosen_by_rule():
    class Drawn:
        def __init__(self, dice, shown):
            self.values, self.shown = dice, shown

        def table(self, name):
            return pd.DataFrame({"name": list(self.values), "dice": list(self.values.values())})

        def panels(self):
            return [type("P", (), {"name": name})() for name in self.shown]

    first, second = {"a": 0.9, "b": 0.5, "c": 0.1, "d": 0.52}, {"a": 0.2, "b": 0.5, "c": 0.3, "d": 0.0}
    assert telling_images(Drawn(first, "abc"), Drawn(second, "cba")) == {"most different": "a", "median": "b", "failure": "c"}
    assert telling_images(Drawn(first, "bc"), Drawn(second, "cb")) == {"most different and failure": "c", "median": "b"}
    assert telling_images(Drawn(first, "ab"), Drawn(second, "cd")) == {}
