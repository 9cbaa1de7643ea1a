"""Pairs of verdicts and of answers that are there already: what is taken, refused, read once, and trained next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.core import SettingsError, UserError, read_jsonl
from helpers.evaluation.generators import Generators
from helpers.evaluation.pairs import make_pairs, make_scorer
from helpers.evaluation.samples import find_prompts
from helpers.runs.run import Run
from tests.evaluation.judging import better, export, rows_of, vote
from tests.evaluation.rounds import pairs_settings, write_answers, write_rows
from tests.evaluation.test_pairs import NO_MODELS, judged, made, of
from tests.judge_server import judge_server

TWO = {"a": [["x 0", "y 0"], ["x 1", "y 1"], ["x 2"]], "b": [["z 0"], ["z 1"], ["z 2", "w 2"]]}


def page_votes(file: Path, *votes: dict[str, Any], page: str = "p1", voter: str = "") -> str:
    name = export(file, list(votes))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"page": page, "voter_id": voter}))
    return name


def next_command(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """The words of 02 that 06 prints, up to the dataset, and the line before them, if there is one."""
    settings = pairs_settings(folder, *words)
    prompts, run = find_prompts(settings), Run(folder / "outputs" / "pairs-x", {})
    samples = prompts.open_store(run.folder, settings)
    samples.import_answers(prompts.answers)
    scored = make_scorer(settings, prompts).run(samples, run)
    pairs = make_pairs(settings, prompts, samples=samples, score_set=scored, generators=NO_MODELS)
    capsys.readouterr()
    pairs.print_next(settings, prompts, run=run)
    *notes, command = capsys.readouterr().out.splitlines()
    return command.removeprefix("Next: python notebooks/02_dpo.py ").partition(" --dataset_id")[0], " ".join(notes)


# ---- Answers with several choices ----


def test_verdicts_on_models_with_several_choices_are_about_their_first(tmp_path: Path) -> None:
    run = judged(tmp_path, "aba", TWO)
    pairs, _ = made(tmp_path, "--from_judgments", str(run))
    assert of(pairs) == [(0, "x 0", "z 0"), (1, "z 1", "x 1"), (2, "x 2", "z 2")]
    assert [(p.chosen.model, p.rejected.model) for p in pairs.pairs] == [("a", "b"), ("b", "a"), ("a", "b")]
    assert pairs.answers["not judged"] == 3  # y 0, y 1, w 2
    assert pairs.metrics["consistency"] == 1.0
    votes = page_votes(tmp_path / "votes.json", vote(0, "a"), vote(1, "b"), vote(2, "tie"))
    pairs, _ = made(tmp_path, "--from_votes", votes, "--answers_dir", str(tmp_path / "outputs" / "vibes-x"))
    assert of(pairs) == [(0, "x 0", "z 0"), (1, "z 1", "x 1")]
    assert pairs.dropped == {"tie": 1}


def test_votes_of_several_people_on_single_choices_count_once(tmp_path: Path) -> None:
    judged(tmp_path, "a", {"a": [["x"]], "b": [["z"]]})
    names = [page_votes(tmp_path / f"{who}.json", vote(0, who[0]), voter=who) for who in ("anne", "abel", "bob")]
    pairs, _ = made(tmp_path, "--from_votes", *names)
    assert [(p.chosen.score, p.rejected.score) for p in pairs.pairs] == [(2, 1)]
    none, _ = made(tmp_path, "--from_votes", *names, "--min_score_margin", "2")
    assert none.dropped == {"margin below --min_score_margin": 1}


def test_ratings_of_models_with_several_choices_are_those_of_their_first(tmp_path: Path) -> None:
    run = judged(tmp_path, "a", TWO, "judge_single")
    rows = [
        {"question_id": str(i), "model": m, "turn": 1, "judge": ["j", "single"], "score": score}
        for m, i, score in [("a", 0, 3), ("b", 0, 8), ("a", 1, 5), ("b", 1, 2)]
    ]
    write_rows(run / "model_judgment" / "judge_single.jsonl", rows)
    pairs, _ = made(tmp_path, "--from_judgments", str(run))
    assert of(pairs) == [(0, "z 0", "x 0"), (1, "x 1", "z 1")]
    assert pairs.answers["not judged"] == 5


def test_a_prompt_without_a_vote_is_not_one_whose_answers_are_the_same(tmp_path: Path) -> None:
    judged(tmp_path, "a", {"m": [["x", "y", "x"], ["x", "y", "x"], ["z", "z", "z"]]})
    names = ["m #1", "m #2", "m #3"]
    votes = page_votes(tmp_path / "v.json", vote(0, "m #2") | {"order": names})
    pairs, _ = made(tmp_path, "--from_votes", votes)
    assert of(pairs) == [(0, "y", "x")]  # once, although two samples are the same
    assert pairs.dropped == {"has no verdict": 1, "all answers are the same": 1}
    assert pairs.lost == {"the answers are the same": 1}
    assert pairs.answers["not judged"] == 3


def test_votes_on_prompts_and_models_that_are_left_out_are_left_out(tmp_path: Path) -> None:
    answers = {name: [[f"{name} 0"], [f"{name} 1"], [f"{name} 2"]] for name in ("a", "b", "c")}
    judged(tmp_path, "a", answers)
    ballots = (vote(0, "a", "abc"), vote(1, "b", "abc"), vote(2, "c", "abc"))
    votes = page_votes(tmp_path / "v.json", *ballots)
    pairs, _ = made(tmp_path, "--from_votes", votes, "--rows", "2", "--models", "a", "b")
    assert of(pairs) == [(0, "a 0", "b 0"), (1, "b 1", "a 1")]
    pairs, _ = made(tmp_path, "--from_votes", votes, "--models", "a", "b")
    assert pairs.dropped == {"has no verdict": 1}  # c won
    pairs, _ = made(tmp_path, "--from_votes", votes, "--chosen_from", "a", "--rejected_from", "b")
    assert of(pairs) == [(0, "a 0", "b 0")]
    assert pairs.dropped == {"--chosen_from is not better": 1, "has no verdict": 1}


# ---- Settings without effect ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from_votes", "v", "--pairing", "all_pairs"], "--pairing has no effect with --from_votes. Remove it."),
        (["--from_votes", "v", "--second_scorer", "judge_module", "--judge_module", "m"],
         "--judge_module and --second_scorer have no effect with --from_votes. Remove them."),
        (["--from_judgments", "j", "--reward_model", "r"], "--reward_model has no effect with --from_judgments"),
        (["--from_judgments", "j", "--max_calls", "3"], "--max_calls has no effect with --from_judgments"),
        (["--from_judgments", "j", "--vote_page"], "--vote_page has no effect with --from_judgments"),
        (["--answers_dir", "d", "--num_samples", "8", "--judge_module", "m"],
         "--num_samples has no effect with --answers_dir"),
        (["--from_votes", "v", "--prompts_file", "f"], "--prompts_file has no effect with --from_votes"),
        (["--prompts", "x", "--judge_module", "m", "--mode", "pairwise"], "--mode has no effect with --judge_module"),
        (["--prompts", "x", "--judge_module", "m", "--reward_quantization", "4bit"],
         "--reward_quantization has no effect with --judge_module"),
        (["--prompts", "x", "--judge_module", "m", "--second_rows", "9"],
         "--second_rows has no effect without --second_scorer"),
        (["--prompts", "x", "--vote_page", "--second_scorer", "judge_module", "--judge_module", "m"],
         "--second_scorer has no effect with --vote_page"),
        (["--prompts", "x", "--vote_page", "--pairing", "all_pairs"], "--pairing has no effect with --vote_page"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused_before_anything_is_read(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_scorer(settings := pairs_settings(tmp_path, *words), find_prompts(settings))
    assert not (tmp_path / "outputs").exists()


def test_two_sources_of_verdicts_or_of_prompts_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--from_judgments j and --from_votes \('v',\) exclude each other"):
        pairs_settings(tmp_path, "--from_judgments", "j", "--from_votes", "v")
    with pytest.raises(SettingsError, match="--prompts_file f and --answers_dir d exclude each other"):
        pairs_settings(tmp_path, "--prompts_file", "f", "--answers_dir", "d")


def test_pairing_is_for_ratings_and_a_recipe_may_have_more_than_is_used(tmp_path: Path) -> None:
    run = judged(tmp_path, "ab", {"a": [["x"], ["y"]], "b": [["z"], ["w"]]})
    with pytest.raises(SettingsError, match=r"--pairing has no effect with --from_judgments. Remove it."):
        made(tmp_path, "--from_judgments", str(run), "--pairing", "best_vs_random")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "pairs:\n  judge_module: nothing\n  pairing: all_pairs\n  num_samples: 3\n  prompts_file: gone\n"
        "  control: true\n  max_calls: 3\n"
    )
    pairs, _ = made(tmp_path, "--recipe", str(recipe), "--from_judgments", str(run))
    assert len(pairs.pairs) == len(pairs.control) == 2
    rows = [
        {"question_id": 0, "model": m, "turn": 1, "judge": ["j", "single"], "score": s} for m, s in (("a", 3), ("b", 8))
    ]
    (run / "model_judgment" / "judge_pair.jsonl").unlink()
    write_rows(run / "model_judgment" / "judge_single.jsonl", rows)
    pairs, _ = made(tmp_path, "--from_judgments", str(run), "--pairing", "all_pairs", "--min_score_margin", "2")
    assert of(pairs) == [(0, "z", "x")]


def test_one_answer_to_each_question_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    folder = write_answers(tmp_path / "given", {"a": [["x"], ["y"]], "b": [["z"], ["w"]]})
    with pytest.raises(UserError, match=r"No question has two answers to compare. Give answers of two"):
        made(tmp_path, "--answers_dir", str(folder), "--models", "a", "--judge_module", "none_such")
    run = judged(tmp_path, "ab", {"a": [["x"], ["y"]], "b": [["z"], ["w"]]})
    with pytest.raises(UserError, match="No question has two answers to compare"):
        made(tmp_path, "--from_judgments", str(run), "--models", "b")


# ---- Messages ----


def test_errors_name_the_flags_of_06(tmp_path: Path) -> None:
    run = judged(tmp_path, "a", {"a": [["x"]], "b": [["z"]]})
    vibes = str(tmp_path / "outputs" / "vibes-x")
    other = page_votes(tmp_path / "other.json", vote(0, "a"), page="p2")
    strange = page_votes(tmp_path / "strange.json", vote(0, "a") | {"winner": "c"})
    empty, junk = page_votes(tmp_path / "empty.json"), write_rows(tmp_path / "junk.json", [{}])
    for words, message in {
        ("--from_votes", "nowhere.json"): r"^--from_votes 'nowhere.json' is not a file of votes",
        ("--from_votes", junk): r"^--from_votes '.*junk.json' is not a file of votes",
        ("--from_votes", other, "--answers_dir", vibes): r"^--from_votes '.*other.json' is of another page",
        ("--from_votes", empty, "--answers_dir", vibes): r"^--from_votes .*empty.json has no votes",
        ("--from_votes", strange, "--answers_dir", vibes): r"^--from_votes '.*strange.json', vote 1, is not on these",
    }.items():
        with pytest.raises(UserError, match=message):
            made(tmp_path, *words)
    file = run / "model_judgment" / "judge_pair.jsonl"
    write_rows(file, [*rows_of("a"), {"question_id": 1}])
    with pytest.raises(UserError, match=r"^--from_judgments '.*judge_pair.jsonl', line 2, is not a row of model_judg"):
        made(tmp_path, "--from_judgments", str(run))
    folder, judge = ("--answers_dir", vibes), ("--judge_model", "judge", "--judge_base_url")
    with pytest.raises(SettingsError, match=r"^--judge_base_url 'nothing' is not an address"):
        made(tmp_path, *folder, *judge, "nothing")
    with (
        judge_server(lambda messages: {"message": {"content": "Well"}, "finish_reason": "length"}) as server,
        pytest.raises(UserError, match=r"If it was cut off, raise --judge_max_new_tokens"),
    ):
        made(tmp_path, *folder, *judge, server.url)


def test_without_a_key_the_judges_flag_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(UserError, match=r"'judge' at OpenAI needs a key: .* or --judge_base_url to an OpenAI-compat"):
        make_scorer(pairs_settings(tmp_path, "--prompts", "x", "--judge_model", "judge"))


def test_judgments_are_read_and_announced_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = judged(tmp_path, "ab", {"a": [["x"], ["y"]], "b": [["z"], ["w"]]})
    read: list[Path] = []
    own: Callable[..., Any] = read_jsonl
    for module in ("judgments", "questions", "pairs", "samples"):
        name = f"helpers.evaluation.{module}.read_jsonl"
        monkeypatch.setattr(name, lambda file, **more: (read.append(Path(file)), own(file, **more))[1], raising=False)
    capsys.readouterr()
    made(tmp_path, "--from_judgments", str(run))
    assert [file.name for file in read].count("judge_pair.jsonl") == 1
    assert capsys.readouterr().out.count("Judged by j: a, b") == 1


# ---- What cannot score is refused before anything is sampled ----


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def rate(answer, question): return 1", "is not a module with score"),
        ("score = 1", "is not a module with score"),
        ("import no_such_package_here\ndef score(answer, question): return 1", "cannot be imported: No module named"),
        ("open('/no/such/file')\ndef score(answer, question): return 1", "cannot be imported: FileNotFoundError: "),
        ("raise SystemExit(2)", "cannot be imported: SystemExit: 2"),
        ("def score(answer): return 1", r"score\(\) fails on the answer 'x' to question 7: TypeError: score\(\) takes"),
        ("def score(answer, question):\n    return 1 / (len(answer) - 1)",
         r"score\(\) fails in line 2 on the answer 'x' to question 7: ZeroDivisionError: .*\. Correct the module\."),
        ("def score(answer, question):\n    return {}[answer]", r"score\(\) fails in line 2 .*: KeyError: 'x'"),
        ("def score(answer, question): return question['key']", "needs a field 'key' in every question"),
        ("def score(answer, question): return None", r"score\(\) returns None. Return a finite number"),
    ],
)  # fmt: skip
def test_rules_that_cannot_work_are_refused_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    module = f"rules_{abs(hash(code))}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"question_id": 7, "prompt": "Why?"}, {"question_id": 8, "prompt": "And?", "key": "so"}]
    words = ["--prompts_file", write_rows(tmp_path / "p.jsonl", rows), "--models", "m@http://127.0.0.1:1/v1"]
    settings = pairs_settings(tmp_path, *words, "--judge_module", module)
    prompts = find_prompts(settings)
    with pytest.raises(SettingsError, match=message):
        make_scorer(settings, prompts)


def test_a_judges_prompts_are_filled_in_before_anything_is_sampled(tmp_path: Path) -> None:
    words = ["--prompts", "Why?", "--models", "m@http://127.0.0.1:1/v1", "--judge_model", "j", "--mode", "pairwise"]
    words += ["--judge_base_url", "http://127.0.0.1:1/v1", "--judge_prompts"]
    rows = {"pair": {"name": "pair", "system_prompt": "", "prompt_template": "{question} {other}"},
            "single": {"name": "single", "system_prompt": "", "prompt_template": "{question}"}}  # fmt: skip
    for name, message in {"pair": "cannot be filled in: 'other'", "single": "has no prompt named pair"}.items():
        file = write_rows(tmp_path / f"{name}.jsonl", [rows[name]])
        settings = pairs_settings(tmp_path, *words, file)
        with pytest.raises(UserError, match=message):
            make_scorer(settings, find_prompts(settings))


def test_a_judge_without_a_flaw_is_asked_nothing_beforehand(tmp_path: Path) -> None:
    with judge_server(better) as server:
        words = [
            "--prompts",
            "Why?",
            "--models",
            f"m@{server.url}",
            "--judge_model",
            "j",
            "--judge_base_url",
            server.url,
        ]
        for mode in ("single", "pairwise"):
            settings = pairs_settings(tmp_path, *words, "--mode", mode)
            make_scorer(settings, find_prompts(settings))
        assert server.requests == []


# ---- The next round ----


def verdicts(winners: str, *models: str) -> list[dict[str, Any]]:
    return [row | {"model_1": models[0], "model_2": models[1]} for row in rows_of(winners)]


def trained(folder: Path, step: str, weights: str) -> str:
    """The folder of a finished run."""
    folder.mkdir(parents=True)
    record = {"step": step, "status": "finished", "fingerprint": weights}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / ("adapter_config.json" if step == "dpo" else "config.json")).write_text("{}")
    return str(folder)


def test_the_next_round_starts_from_the_model_whose_answers_were_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs, answers = tmp_path / "outputs", {"org-base": [["x"]], "m": [["z"]]}
    vibes = outputs / "vibes-x"
    words = ["--from_judgments", "j.jsonl", "--answers_dir", str(vibes)]

    def printed(models: list[str], *more: str, name: str = "m", **record: Any) -> tuple[str, str]:
        own = {(name if key == "m" else key): value for key, value in answers.items()}
        write_rows(tmp_path / "j.jsonl", verdicts("a", "org-base", name))
        given = {"models": models, "base_url": record.pop("base_url", "")}
        write_answers(vibes, own, step="vibes", status="finished", models=[*own], settings=given, **record)
        return next_command(tmp_path, capsys, *words, *more)

    assert printed(["org/base", "org/m"]) == ("--model_id org/m", "")
    assert printed(["org/base", "gpt2"], name="gpt2") == ("--model_id gpt2", "")
    assert printed(["org/base", "org/m"], "--models", "m", "org-base")[0] == "--model_id MODEL"
    assert printed(["org/m@http://127.0.0.1:1/v1"]) == ("--model_id org/m", "")  # a server has the name of its model
    unknown = (
        "note: The location of the weights of m is unknown. Replace MODEL by its folder or Hub id, or give --sft_run"
    )
    flag, note = printed(["m@http://127.0.0.1:1/v1"])
    assert flag == "--model_id MODEL"
    assert note.startswith(unknown)
    assert printed(["m"], base_url="http://127.0.0.1:1/v1")[0] == "--model_id MODEL"
    assert printed([], base_model="org/m") == ("--model_id org/m", "")  # 04's base of an adapter
    model = trained(tmp_path / "elsewhere" / "m", "none", "w0")
    assert printed([model]) == ("--model_id elsewhere/m", "")
    trained(outputs / "renamed", "dpo", "w1")
    assert printed(["outputs/m"], weights={"m": "w1"}) == ("--sft_run outputs/renamed", "")
    trained(outputs / "m", "dpo", "w2")  # the newer one of the same name has other weights
    assert printed(["outputs/m"], weights={"m": "w1"}) == ("--sft_run outputs/renamed", "")
    assert printed(["latest"]) == ("--sft_run outputs/m", "")
    assert printed(["outputs/m"], weights={"m": "w9"})[0] == "--sft_run outputs/m"
    trained(outputs / "merged", "merge", "w3")
    assert printed(["outputs/merged"], name="merged", weights={"merged": "w3"}) == ("--model_id outputs/merged", "")
    adapter = tmp_path / "peft"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    flag, note = printed(["peft"], name="peft")
    assert flag == "--model_id MODEL"
    assert "peft is an adapter. Merge it with `python notebooks/03_merge_push.py --adapter peft`" in note


def test_fastchats_names_are_not_taken_for_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = write_answers(tmp_path / "bench", {"gpt-4": [["x"], ["y"]], "vicuna-7b": [["z"], ["w"]]})
    write_rows(bench / "model_judgment" / "gpt-4_pair.jsonl", verdicts("ab", "gpt-4", "vicuna-7b"))
    flag, note = next_command(tmp_path, capsys, "--from_judgments", str(bench))
    assert flag == "--model_id MODEL"
    assert note.startswith("note: The location of the weights of vicuna-7b is unknown.")
    trained(tmp_path / "outputs" / "vicuna-7b", "sft", "w1")
    assert next_command(tmp_path, capsys, "--from_judgments", str(bench))[0].endswith("outputs/vicuna-7b")


def test_votes_on_a_page_of_06_lead_back_to_the_model_that_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_answers(tmp_path / "given", {"m": [["x", "y"]]}, step="vibes", models=["m"],
                          settings={"models": ["org/m"]})  # fmt: skip
    outputs = tmp_path / "outputs"
    page = write_answers(outputs / "pairs-p", {"m": [["x", "y"]]}, step="pairs", models=["m"], page="p1",
                         settings={"answers_dir": str(given), "models": ["latest"]})  # fmt: skip
    ballot = vote(0, "m #2") | {"order": ["m #1", "m #2"]}
    votes = page_votes(tmp_path / "v.json", ballot)
    assert next_command(tmp_path, capsys, "--from_votes", votes, "--answers_dir", str(page)) == ("--model_id org/m", "")


def test_an_address_is_named_by_what_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pairs_settings(tmp_path, "--prompts", "x", "--models", "m@http:///v1")
    with pytest.raises(SettingsError, match=r"^--models 'http:///v1' is not an address"):
        Generators(find_prompts(settings).models, settings)
    monkeypatch.setenv("OPENAI_BASE_URL", "elsewhere")
    with pytest.raises(SettingsError, match=r"^OPENAI_BASE_URL 'elsewhere' is not an address"):
        make_scorer(pairs_settings(tmp_path, "--prompts", "x", "--judge_model", "judge"))
