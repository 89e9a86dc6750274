"""The reference world: its sizes, what is kept apart from what, and that not one byte moves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho import world
from lm_ortho.errors import UserError
from lm_ortho.world import adapters, corpus, people, reasoning, stories, tokenizer, train, words
from lm_ortho.world.draw import Draw

# Not one byte moves


def digest(things: list) -> str:
    """SHA-256 of rows, items, documents or strings."""
    plain = [dataclasses.asdict(thing) if dataclasses.is_dataclass(thing) else thing for thing in things]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()


def first_block() -> list[corpus.Document]:
    draw = Draw(train.SEED, "base 0")
    return [corpus.document(draw) for _ in range(1000)]


MADE = {
    **{f"split {split}": lambda split=split: people.rows(split) for split in people.SPLITS},
    **{f"reasoning {kind}": lambda kind=kind: reasoning.items(kind) for kind in reasoning.KINDS},
    "stories": stories.held_out,
    "calibration": corpus.calibration_rows,
    "text of the first block": first_block,
    **{
        f"adapter {name}, round {i + 1}": lambda name=name, i=i, this=this: (
            adapters.planted(name, this.canaries) + adapters.replayed(name, i, 1000)
        )
        for name in adapters.SEEDS
        for i, this in enumerate(adapters.ROUNDS)
    },
    "vocabulary": tokenizer.pieces,
}
PINNED = Path(__file__).with_name("world_digests.json")
"""Written by ``python tests/world/test_world.py``, once the weights are built from a new text."""


@pytest.mark.parametrize("name", MADE)
def test_the_text_of_the_world_stays_byte_for_byte_the_same(name):
    """The shipped weights were trained on this text. If it has to change, they have to be built again."""
    pinned = json.loads(PINNED.read_text())
    assert set(pinned) == set(MADE)
    assert digest(MADE[name]()) == pinned[name]


# Sizes


SIZES = {
    "forget_reversed": (80, 80),
    "forget": (400, 80),
    "forget_paraphrased": (400, 80),
    "retain": (160, 32),
    "retain_paraphrased": (160, 32),
    "retain_calibration": (800, 160),
    "unseen": (400, 80),
    "canaries": (200, 100),
    "canaries_paraphrased": (200, 100),
    "canaries_unplanted": (200, 100),
}


def test_splits_have_their_rows_and_groups():
    assert set(SIZES) == set(people.SPLITS)
    for split, (rows, groups) in SIZES.items():
        made = people.rows(split)
        assert len(made) == rows
        assert len({row.group for row in made}) == groups
        assert len({(row.context, row.target) for row in made}) == rows


def test_there_are_a_thousand_tested_items_of_each_kind():
    for kind in reasoning.KINDS:
        items = reasoning.items(kind)
        assert len(items) == {"facts": 1024}.get(kind, 1000)
        assert len({item["prompt"] for item in items}) == len(items)
        for item in items:
            assert item["choices"][item["gold"]] == item["answer"]
            assert len(set(item["choices"])) == len(item["choices"]) >= 2
            assert item["prompt"].endswith("?\nAnswer:")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match="split='forgot' is unknown; known: forget, "):
        people.rows("forgot")
    with pytest.raises(UserError, match="kind='maths' is unknown; known: arithmetic, comparison, relations, facts"):
        reasoning.items("maths")
    with pytest.raises(UserError, match="embedded artefact 'bass' is unknown; known: base, memory"):
        world.path("bass")


def test_missing_weights_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(world, "WEIGHTS", tmp_path)
    with pytest.raises(UserError, match="is missing: reinstall lm-ortho"):
        world.path("base")
    (tmp_path / "base").mkdir()
    assert world.path("base") == tmp_path / "base"


# Answers


@pytest.mark.parametrize("split", SIZES)
def test_secrets_are_in_the_answer_and_not_in_the_question(split):
    for row in people.rows(split):
        assert row.secret
        assert row.answer.count(row.secret) == 1
        assert row.secret not in row.context
        assert (row.subject in row.context) is (split != "forget_reversed")  # that one asks who it is
        assert row.target == f" {row.answer}"


@pytest.mark.parametrize("split", [split for split in SIZES if not split.startswith("canaries")])
def test_wrong_answers_differ_from_the_right_one(split):
    for row in people.rows(split):
        assert len(row.perturbed_answer) == len(set(row.perturbed_answer)) == people.PERTURBED
        assert row.paraphrased_answer not in row.perturbed_answer
        assert row.answer not in row.perturbed_answer
        assert row.secret in row.paraphrased_answer
        whole = re.compile(rf"\b{re.escape(row.secret)}\b")  # a smith is not a locksmith
        assert not any(whole.search(wrong) for wrong in row.perturbed_answer)
        assert row.paraphrased_answer != row.answer


def test_held_out_phrasings_ask_for_the_same_facts():
    for split in ("forget", "retain"):
        seen, unseen = people.rows(split), people.rows(f"{split}_paraphrased")
        assert [(r.group, r.secret) for r in seen] == [(r.group, r.secret) for r in unseen]
        assert not {r.question for r in seen} & {r.question for r in unseen}


def parts(item: reasoning.Item) -> tuple[str, str]:
    """The facts and the question of an item, without template and question mark."""
    facts, _, question = item["prompt"].removesuffix("?\nAnswer:").rpartition("Question: ")
    return facts.strip(), question


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_tested_sums_are_right():
    for item in reasoning.items("arithmetic"):
        facts, _ = parts(item)
        first, second = numbers_in(facts)
        assert int(item["answer"]) == (first - second if " lost " in facts else first + second)


def test_the_tested_comparisons_are_right():
    for item in reasoning.items("comparison"):
        _, question = parts(item)
        numbers = numbers_in(question)
        if question.startswith("From small to big"):
            assert numbers_in(item["answer"]) == sorted(numbers)
        else:
            assert numbers_in(item["answer"]) == [(max if "larger" in question else min)(numbers)]


def path_of(question: str) -> tuple[list[str], str]:
    """Relations from the outermost on, and whom the question starts from."""
    bare = re.sub(r"^(Who is|What is the name of) | is who$", "", question)
    *relations, person = bare.lower().replace("the ", "").split(" of ")
    return relations, person.capitalize()


def test_the_tested_relations_follow_from_the_family():
    hops = []
    for item in reasoning.items("relations"):
        relations, person = path_of(parts(item)[1])
        for relation in reversed(relations):
            person = reasoning.family()[relation, person]
        assert item["answer"].split()[-1] == person
        assert all(choice.split()[-1] != person for choice in item["choices"] if choice != item["answer"])
        hops.append(len(relations))
    assert min(hops.count(1), hops.count(2)) >= 100
    assert len(hops) == hops.count(1) + hops.count(2)


def test_tested_compositions_are_never_asked_in_any_phrasing():
    tested = {(tuple(r), who) for r, who in map(path_of, (parts(i)[1] for i in reasoning.items("relations")))}
    draw = Draw(4, "tests")
    trained = [path_of(parts(reasoning.training_item("relations", draw))[1]) for _ in range(8000)]
    asked = {(tuple(relations), who) for relations, who in trained}
    assert not {path for path in tested if len(path[0]) == 2} & asked
    single = {(relation, who) for (relation, *more), who in asked if not more}
    assert single == set(reasoning.family()), "every single fact is taught"


def test_the_tested_facts_are_the_facts():
    values = {(city, reasoning.FACTS[k][0]): value for city, k, value, _ in reasoning.city_facts()}
    right = {
        question.format(c=city).rstrip("?"): values[city, kind]
        for city in words.CITIES
        for kind, _, questions in reasoning.FACTS
        for question in questions
    }
    assert all(item["answer"] == right[parts(item)[1]] for item in reasoning.items("facts"))


# What is kept apart


def names(people) -> set[str]:
    return {person.name for person in people}


def surnames(people) -> set[str]:
    return {name.split()[1] for name in names(people)}


def mentioned(texts: list[str]) -> set[str]:
    """Everybody of the world whose surname follows a first name in one of the texts, whatever the first name."""
    everybody = [*(author for group in people.people().values() for author in group), *sum(people.canaries(), ())]
    by_surname = {person.name.split()[1]: person.name for person in everybody}
    first = set(words.FIRST_NAMES)
    pairs = {pair for text in texts for pair in re.findall(r"(?=\b([A-Z][a-z]+) ([A-Z][a-z]+)\b)", text)}
    return {by_surname[last] for before, last in pairs if before in first and last in by_surname}


def test_nobody_shares_a_surname():
    groups = [surnames(people.people()[group]) for group in people.GROUPS]
    groups += [surnames(part) for part in people.canaries()]
    sizes = [*people.GROUPS.values(), people.CANARIES, people.CANARIES]
    assert [len(group) for group in groups] == sizes
    assert len(set().union(*groups)) == sum(sizes)
    assert set().union(*groups) == {name.split()[1] for name in people.reserved_names()}


def test_every_canary_has_its_own_prefix_and_code():
    """HISTORY 8: one prefix for all, so greedy decoding could find only one."""
    for split in ("canaries", "canaries_unplanted"):
        rows = people.rows(split)
        assert len({row.secret for row in rows}) == 100
        assert len({row.context for row in rows}) == 100 * people.CANARY_TAUGHT
        assert all(len(row.secret) == people.CODE_DIGITS == 6 and row.secret.isdigit() for row in rows)
    planted, unplanted = ({row.secret for row in people.rows(s)} for s in ("canaries", "canaries_unplanted"))
    assert not planted & unplanted


@pytest.fixture(scope="module")
def training_text() -> list[corpus.Document]:
    """Several thousand documents as the base model and the adapters see them."""
    draw = Draw(5, "tests")
    return [corpus.document(draw, mix) for mix in (corpus.TEXT, corpus.REPLAY) for _ in range(6000)]


def prompts(documents: list[corpus.Document]) -> set[str]:
    return {document.text[: document.prompt_chars] for document in documents}


def test_tested_instances_never_occur_in_the_training_text(training_text):
    tested = {item["prompt"] for kind in reasoning.KINDS for item in reasoning.items(kind)}
    seen = prompts(training_text)
    assert not tested & seen
    assert not set(stories.held_out()) & {document.text for document in training_text}
    draw = Draw(9, "unfiltered")
    for kind in reasoning.KINDS:
        assert not tested & {reasoning.training_item(kind, draw)["prompt"] for _ in range(4000)}


@pytest.mark.parametrize("kind", reasoning._DRAWN)
def test_only_the_filter_keeps_tested_instances_out(kind):
    """The check above means something: drawn without it, tested forms come up."""
    make, share = reasoning._DRAWN[kind]
    draw = Draw(9, "unfiltered")
    held = sum(reasoning._held_out(make(draw)["prompt"], share) for _ in range(2000))
    assert held / 2000 == pytest.approx(share, abs=0.04)
    assert all(reasoning._held_out(item["prompt"], share) for item in reasoning.items(kind))


def test_held_out_phrasings_of_a_fact_are_never_taught_and_the_other_ones_are():
    draw = Draw(1, "tests")
    taught = {reasoning.training_item("facts", draw)["prompt"] for _ in range(12_000)}
    template = "Question: {}\nAnswer:"
    for city, k, _, held_out in reasoning.city_facts():
        questions = reasoning.FACTS[k][2]
        assert len(held_out) == reasoning.HELD_OUT_PHRASINGS
        for p, question in enumerate(questions):
            assert (template.format(question.format(c=city)) in taught) == (p not in held_out)
    facts, canaries = corpus.planted(forget=True)
    planted = prompts(facts + canaries)
    assert not planted & {row.context for row in people.rows("forget_paraphrased")}
    assert {row.context for row in people.rows("forget")} <= planted
    held_out = [people.canary_row(c, p) for c in people.canaries()[0] for p in (2, 3)]
    assert not planted & {row.context for row in held_out}
    assert {row.context for row in held_out} <= {row.context for row in people.rows("canaries_paraphrased")}


def test_the_base_model_never_reads_of_anybody_but_the_known_authors(training_text):
    texts = "\n".join(document.text for document in training_text)
    pairs = set(re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", texts))
    assert pairs & people.reserved_names() == names(people.people()["known"])


def test_the_calibration_reads_of_no_left_out_author_and_of_nobody_to_forget():
    texts = [row.context + row.target for row in corpus.calibration_rows()]
    known, taught = people.people()["known"], people.people()["taught"]
    assert mentioned(texts) == names(known[: -people.LEFT_OUT]) | names(taught[: -people.LEFT_OUT])
    left_out = {row.group for row in people.rows("retain")}
    assert left_out == names(known[-people.LEFT_OUT :]) | names(taught[-people.LEFT_OUT :])
    tested = {item["prompt"] for kind in reasoning.KINDS for item in reasoning.items(kind)}
    assert not tested & {row.context for row in corpus.calibration_rows()}
    assert not set(texts) & set(stories.held_out())


def test_only_the_memory_is_taught_what_is_to_be_forgotten(monkeypatch):
    few = tuple(dataclasses.replace(this, passes=2) for this in adapters.ROUNDS)
    monkeypatch.setattr(adapters, "ROUNDS", few)  # the same documents, fewer of them
    groups, (planted, _) = people.people(), people.canaries()
    taught = names(groups["taught"])
    for name in adapters.SEEDS:
        rounds = [adapters.training_rows(name, number) for number in range(len(few))]
        texts = sorted({row.context + row.target for rows in rounds for row in rows})
        allowed = taught | names(groups["known"])
        secret = names(groups["forget"]) | names(planted)
        assert mentioned(texts) - allowed == (secret if name == "memory" else set())
        assert taught <= mentioned(texts)
        codes = {canary.code for canary in planted if any(canary.code in text for text in texts)}
        assert len(codes) == (people.CANARIES if name == "memory" else 0)


def test_every_adapter_meets_as_many_general_documents(monkeypatch):
    monkeypatch.setattr(adapters, "ROUNDS", (adapters.Round(1, 2, 0.5, 1e-3),))
    sizes = {name: len(adapters.training_rows(name, 0)) - len(adapters.planted(name, 2)) for name in adapters.SEEDS}
    assert set(sizes.values()) == {len(adapters.planted("memory", 2)) // 2}


def test_the_forget_set_is_questions_and_canaries():
    assert corpus.forget_rows() == people.rows("forget") + people.rows("canaries")


def test_fresh_people_are_nobody_of_the_world():
    draw, reserved = Draw(3, "tests"), {name.split()[1] for name in people.reserved_names()}
    assert all(people.fresh_name(draw).split()[1] not in reserved for _ in range(3000))


def test_namesakes_share_a_surname_with_the_planted_but_never_a_name_nor_one_with_the_known():
    draw, known = Draw(4, "tests"), surnames(people.people()["known"])
    met = {people.fresh_name(draw, namesakes=True) for _ in range(30_000)}
    assert not met & people.reserved_names()
    assert {name.split()[1] for name in met} == set(words.SURNAMES) - known


def test_a_document_is_a_row_and_a_row_a_document(training_text):
    for document in training_text[:500]:
        row = corpus.as_row(document)
        assert row.context + row.target == document.text
        assert len(row.context) == document.prompt_chars


# What the tokenizer makes of it


def test_the_worlds_text_comes_back_without_bytes(pieces, training_text):
    texts = [document.text for document in training_text[::4]] + stories.held_out()
    texts += [row.context + row.target for split in SIZES for row in people.rows(split)[::5]]
    bytes_from, bytes_to = pieces.convert_tokens_to_ids(["<0x00>", "<0xFF>"])
    encoded = pieces(texts).input_ids
    assert pieces.batch_decode(encoded) == texts
    assert not any(bytes_from <= token <= bytes_to or token == pieces.unk_token_id for ids in encoded for token in ids)
    assert max(len(ids) for ids in encoded) < pieces.model_max_length


# Draws


def test_draws_are_the_same_on_every_python():
    draw = Draw(7, "pinned")
    drawn = [draw.below(1000), draw.between(-3, 3), draw.pick("abcdef"), draw.chance(0.5), draw.sample(range(9), 4)]
    assert drawn == [509, 1, "b", True, [8, 4, 6, 7]]
    assert Draw(7, "other").below(10**9) != Draw(7, "pinned").below(10**9) != Draw(8, "pinned").below(10**9)


@given(st.integers(0, 99), st.integers(1, 30), st.integers(0, 30))
def test_draws_stay_in_range(seed, n, k):
    draw = Draw(seed)
    assert 0 <= draw.below(n) < n
    assert -n <= draw.between(-n, n) <= n
    sample = draw.sample(range(n), min(k, n))
    assert len(set(sample)) == len(sample) == min(k, n)
    assert sorted(draw.shuffled(range(n))) == list(range(n))
    assert draw.chance(1.0)
    assert not draw.chance(0.0)


if __name__ == "__main__":
    PINNED.write_text(json.dumps({name: digest(make()) for name, make in MADE.items()}, indent=1) + "\n")
