"""The embedded world: its sizes, what is held out of what, and that not one byte changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho import world
from lm_ortho.errors import UserError
from lm_ortho.world import adapters, corpus, people, reasoning, stories, tokenizer, train, words
from lm_ortho.world.draw import SeededRandom

# Not one byte changes


def compute_digest(texts: list) -> str:
    """SHA-256 of rows, items, documents or strings."""
    plain = [dataclasses.asdict(text) if dataclasses.is_dataclass(text) else text for text in texts]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()


def draw_first_block() -> list[corpus.Document]:
    rng = SeededRandom(train.SEED, "base 0")
    return [corpus.draw_document(rng) for _ in range(1000)]


TEXTS = {
    **{f"split {split}": lambda split=split: people.make_rows(split) for split in people.SPLITS},
    **{f"reasoning {kind}": lambda kind=kind: reasoning.make_test_items(kind) for kind in reasoning.KINDS},
    "stories": stories.draw_held_out,
    "calibration": corpus.make_calibration_rows,
    "text of the first block": draw_first_block,
    **{
        f"adapter {name}, round {i + 1}": lambda name=name, i=i, plan=plan: (
            adapters.make_planted_rows(name, plan.canary_repetitions) + adapters.draw_replay_rows(name, i, 1000)
        )
        for name in adapters.SEEDS
        for i, plan in enumerate(adapters.ROUNDS)
    },
    "vocabulary": tokenizer.collect_pieces,
}
PINNED = Path(__file__).with_name("world_digests.json")
"""The digests. ``python tests/world/test_world.py`` writes them, once the weights are built from a new text."""


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_the_world_stays_byte_for_byte_the_same(name):
    """The shipped weights were trained on this text. If it has to change, they have to be built again."""
    pinned = json.loads(PINNED.read_text())
    assert set(pinned) == set(TEXTS)
    assert compute_digest(TEXTS[name]()) == pinned[name]


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
        split_rows = people.make_rows(split)
        assert len(split_rows) == rows
        assert len({row.group for row in split_rows}) == groups
        assert len({(row.context, row.target) for row in split_rows}) == rows


def test_there_are_a_thousand_tested_items_of_each_kind():
    for kind in reasoning.KINDS:
        items = reasoning.make_test_items(kind)
        assert len(items) == {"facts": 1024}.get(kind, 1000)
        assert len({item["prompt"] for item in items}) == len(items)
        for item in items:
            assert item["choices"][item["gold"]] == item["answer"]
            assert len(set(item["choices"])) == len(item["choices"]) >= 2
            assert item["prompt"].endswith("?\nAnswer:")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match="split='forgot' is unknown; known: forget, "):
        people.make_rows("forgot")
    with pytest.raises(UserError, match="kind='maths' is unknown; known: arithmetic, comparison, relations, facts"):
        reasoning.make_test_items("maths")
    with pytest.raises(UserError, match="embedded artefact 'bass' is unknown; known: base, memory"):
        world.get_path("bass")


def test_missing_weights_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(world, "WEIGHTS", tmp_path)
    with pytest.raises(UserError, match="is missing: reinstall lm-ortho"):
        world.get_path("base")
    (tmp_path / "base").mkdir()
    assert world.get_path("base") == tmp_path / "base"


# Answers


@pytest.mark.parametrize("split", SIZES)
def test_secrets_are_in_the_answer_and_not_in_the_question(split):
    for row in people.make_rows(split):
        assert row.secret
        assert row.answer.count(row.secret) == 1
        assert row.secret not in row.context
        assert (row.subject in row.context) is (split != "forget_reversed")  # that one asks who it is
        assert row.target == f" {row.answer}"


@pytest.mark.parametrize("split", [split for split in SIZES if not split.startswith("canaries")])
def test_wrong_answers_differ_from_the_right_one(split):
    for row in people.make_rows(split):
        assert len(row.perturbed_answer) == len(set(row.perturbed_answer)) == people.WRONG_ANSWERS
        assert row.paraphrased_answer not in row.perturbed_answer
        assert row.answer not in row.perturbed_answer
        assert row.secret in row.paraphrased_answer
        pattern = re.compile(rf"\b{re.escape(row.secret)}\b")  # a smith is not a locksmith
        assert not any(pattern.search(wrong) for wrong in row.perturbed_answer)
        assert row.paraphrased_answer != row.answer


def test_held_out_phrasings_ask_for_the_same_facts():
    for split in ("forget", "retain"):
        rows, held_out_rows = people.make_rows(split), people.make_rows(f"{split}_paraphrased")
        assert [(r.group, r.secret) for r in rows] == [(r.group, r.secret) for r in held_out_rows]
        assert not {r.question for r in rows} & {r.question for r in held_out_rows}


def split_prompt(item: reasoning.Item) -> tuple[str, str]:
    """Splits the prompt of an item into its facts and its question, without template and question mark."""
    facts, _, question = item["prompt"].removesuffix("?\nAnswer:").rpartition("Question: ")
    return facts.strip(), question


def parse_numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_tested_sums_are_right():
    for item in reasoning.make_test_items("arithmetic"):
        facts, _ = split_prompt(item)
        first, second = parse_numbers(facts)
        assert int(item["answer"]) == (first - second if " lost " in facts else first + second)


def test_the_tested_comparisons_are_right():
    for item in reasoning.make_test_items("comparison"):
        _, question = split_prompt(item)
        numbers = parse_numbers(question)
        if question.startswith("From small to big"):
            assert parse_numbers(item["answer"]) == sorted(numbers)
        else:
            assert parse_numbers(item["answer"]) == [(max if "larger" in question else min)(numbers)]


def parse_relations(question: str) -> tuple[list[str], str]:
    """Returns the relations, the outermost first, and the person that the question starts from."""
    path = re.sub(r"^(Who is|What is the name of) | is who$", "", question)
    *relations, person = path.lower().replace("the ", "").split(" of ")
    return relations, person.capitalize()


def test_the_tested_relations_follow_from_the_family():
    hops = []
    for item in reasoning.make_test_items("relations"):
        relations, person = parse_relations(split_prompt(item)[1])
        for relation in reversed(relations):
            person = reasoning.draw_family()[relation, person]
        assert item["answer"].split()[-1] == person
        assert all(choice.split()[-1] != person for choice in item["choices"] if choice != item["answer"])
        hops.append(len(relations))
    assert min(hops.count(1), hops.count(2)) >= 100
    assert len(hops) == hops.count(1) + hops.count(2)


def test_tested_compositions_are_never_asked_in_any_phrasing():
    tested = {
        (tuple(r), who)
        for r, who in map(parse_relations, (split_prompt(i)[1] for i in reasoning.make_test_items("relations")))
    }
    rng = SeededRandom(4, "tests")
    trained = [parse_relations(split_prompt(reasoning.draw_training_item("relations", rng))[1]) for _ in range(8000)]
    taught = {(tuple(relations), who) for relations, who in trained}
    assert not {path for path in tested if len(path[0]) == 2} & taught
    single = {(relation, who) for (relation, *more), who in taught if not more}
    assert single == set(reasoning.draw_family()), "every single fact is taught"


def test_the_tested_facts_are_the_facts():
    values = {(city, reasoning.FACTS[k][0]): value for city, k, value, _ in reasoning.draw_city_facts()}
    right = {
        question.format(c=city).rstrip("?"): values[city, kind]
        for city in words.CITIES
        for kind, _, questions in reasoning.FACTS
        for question in questions
    }
    assert all(item["answer"] == right[split_prompt(item)[1]] for item in reasoning.make_test_items("facts"))


# What is held out


def get_names(people) -> set[str]:
    return {person.name for person in people}


def get_surnames(people) -> set[str]:
    return {name.split()[1] for name in get_names(people)}


def find_mentions(texts: list[str]) -> set[str]:
    """Finds everybody of the world whose surname follows a first name in one of the texts, whatever the first name."""
    names = [author.name for group in people.draw_groups().values() for author in group]
    names += [canary.name for canary in chain.from_iterable(people.draw_canaries())]
    by_surname = {name.split()[1]: name for name in names}
    first = set(words.FIRST_NAMES)
    pairs = {pair for text in texts for pair in re.findall(r"(?=\b([A-Z][a-z]+) ([A-Z][a-z]+)\b)", text)}
    return {by_surname[last] for before, last in pairs if before in first and last in by_surname}


def test_nobody_shares_a_surname():
    groups = [get_surnames(people.draw_groups()[group]) for group in people.GROUPS]
    groups += [get_surnames(part) for part in people.draw_canaries()]
    sizes = [*people.GROUPS.values(), people.CANARIES, people.CANARIES]
    assert [len(group) for group in groups] == sizes
    assert len(set().union(*groups)) == sum(sizes)
    assert set().union(*groups) == {name.split()[1] for name in people.collect_reserved_names()}


def test_every_canary_has_its_own_prefix_and_code():
    """HISTORY 8: one prefix for all, so greedy decoding could find only one."""
    for split in ("canaries", "canaries_unplanted"):
        rows = people.make_rows(split)
        assert len({row.secret for row in rows}) == 100
        assert len({row.context for row in rows}) == 100 * people.TAUGHT_CANARY_PROMPTS
        assert all(len(row.secret) == people.CODE_DIGITS == 6 and row.secret.isdigit() for row in rows)
    planted, unplanted = ({row.secret for row in people.make_rows(s)} for s in ("canaries", "canaries_unplanted"))
    assert not planted & unplanted


@pytest.fixture(scope="module")
def training_text() -> list[corpus.Document]:
    """Several thousand documents, drawn as for the base model and the adapters."""
    rng = SeededRandom(5, "tests")
    return [corpus.draw_document(rng, mix) for mix in (corpus.TEXT, corpus.REPLAY) for _ in range(6000)]


def get_prompts(documents: list[corpus.Document]) -> set[str]:
    return {document.text[: document.prompt_chars] for document in documents}


def test_tested_instances_never_occur_in_the_training_text(training_text):
    tested = {item["prompt"] for kind in reasoning.KINDS for item in reasoning.make_test_items(kind)}
    assert not tested & get_prompts(training_text)
    assert not set(stories.draw_held_out()) & {document.text for document in training_text}
    rng = SeededRandom(9, "unfiltered")
    for kind in reasoning.KINDS:
        assert not tested & {reasoning.draw_training_item(kind, rng)["prompt"] for _ in range(4000)}


@pytest.mark.parametrize("kind", reasoning._GENERATORS)
def test_only_the_filter_keeps_tested_instances_out(kind):
    """The check above is not vacuous: without the filter, test items are drawn."""
    make, share = reasoning._GENERATORS[kind]
    rng = SeededRandom(9, "unfiltered")
    count = sum(reasoning._is_held_out(make(rng)["prompt"], share) for _ in range(2000))
    assert count / 2000 == pytest.approx(share, abs=0.04)
    assert all(reasoning._is_held_out(item["prompt"], share) for item in reasoning.make_test_items(kind))


def test_held_out_phrasings_of_a_fact_are_never_taught_and_the_other_ones_are():
    rng = SeededRandom(1, "tests")
    taught = {reasoning.draw_training_item("facts", rng)["prompt"] for _ in range(12_000)}
    template = "Question: {}\nAnswer:"
    for city, k, _, held_out in reasoning.draw_city_facts():
        questions = reasoning.FACTS[k][2]
        assert len(held_out) == reasoning.HELD_OUT_PHRASINGS
        for p, question in enumerate(questions):
            assert (template.format(question.format(c=city)) in taught) == (p not in held_out)
    facts, canaries = corpus.make_planted_documents(forget=True)
    planted = get_prompts(facts + canaries)
    assert not planted & {row.context for row in people.make_rows("forget_paraphrased")}
    assert {row.context for row in people.make_rows("forget")} <= planted
    held_out_rows = [people.make_canary_row(c, p) for c in people.draw_canaries()[0] for p in (2, 3)]
    assert not planted & {row.context for row in held_out_rows}
    assert {row.context for row in held_out_rows} <= {row.context for row in people.make_rows("canaries_paraphrased")}


def test_the_base_model_never_reads_of_anybody_but_the_known_authors(training_text):
    texts = "\n".join(document.text for document in training_text)
    pairs = set(re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", texts))
    assert pairs & people.collect_reserved_names() == get_names(people.draw_groups()["known"])


def test_the_calibration_reads_of_no_left_out_author_and_of_nobody_to_forget():
    texts = [row.context + row.target for row in corpus.make_calibration_rows()]
    known, taught = people.draw_groups()["known"], people.draw_groups()["taught"]
    assert find_mentions(texts) == get_names(known[: -people.LEFT_OUT_AUTHORS]) | get_names(
        taught[: -people.LEFT_OUT_AUTHORS]
    )
    left_out = {row.group for row in people.make_rows("retain")}
    assert left_out == get_names(known[-people.LEFT_OUT_AUTHORS :]) | get_names(taught[-people.LEFT_OUT_AUTHORS :])
    tested = {item["prompt"] for kind in reasoning.KINDS for item in reasoning.make_test_items(kind)}
    assert not tested & {row.context for row in corpus.make_calibration_rows()}
    assert not set(texts) & set(stories.draw_held_out())


def test_only_the_memory_is_taught_what_is_to_be_forgotten(monkeypatch):
    short_rounds = tuple(dataclasses.replace(plan, passes=2) for plan in adapters.ROUNDS)
    monkeypatch.setattr(adapters, "ROUNDS", short_rounds)  # the same documents, fewer of them
    groups, (planted, _) = people.draw_groups(), people.draw_canaries()
    taught = get_names(groups["taught"])
    for name in adapters.SEEDS:
        rounds = [adapters.make_training_rows(name, number) for number in range(len(short_rounds))]
        texts = sorted({row.context + row.target for rows in rounds for row in rows})
        allowed = taught | get_names(groups["known"])
        secret = get_names(groups["forget"]) | get_names(planted)
        assert find_mentions(texts) - allowed == (secret if name == "memory" else set())
        assert taught <= find_mentions(texts)
        codes = {canary.code for canary in planted if any(canary.code in text for text in texts)}
        assert len(codes) == (people.CANARIES if name == "memory" else 0)


def test_every_adapter_meets_as_many_general_documents(monkeypatch):
    monkeypatch.setattr(adapters, "ROUNDS", (adapters.Round(1, 2, 0.5, 1e-3),))
    sizes = {
        name: len(adapters.make_training_rows(name, 0)) - len(adapters.make_planted_rows(name, 2))
        for name in adapters.SEEDS
    }
    assert set(sizes.values()) == {len(adapters.make_planted_rows("memory", 2)) // 2}


def test_the_forget_set_is_questions_and_canaries():
    assert corpus.make_forget_rows() == people.make_rows("forget") + people.make_rows("canaries")


def test_fresh_people_are_nobody_of_the_world():
    rng, reserved = SeededRandom(3, "tests"), {name.split()[1] for name in people.collect_reserved_names()}
    assert all(people.draw_name(rng).split()[1] not in reserved for _ in range(3000))


def test_namesakes_share_a_surname_with_the_planted_but_never_a_name_nor_one_with_the_known():
    rng, known = SeededRandom(4, "tests"), get_surnames(people.draw_groups()["known"])
    drawn_names = {people.draw_name(rng, namesakes=True) for _ in range(30_000)}
    assert not drawn_names & people.collect_reserved_names()
    assert {name.split()[1] for name in drawn_names} == set(words.SURNAMES) - known


def test_a_document_is_a_row_and_a_row_a_document(training_text):
    for document in training_text[:500]:
        row = corpus.to_row(document)
        assert row.context + row.target == document.text
        assert len(row.context) == document.prompt_chars


# How the tokenizer encodes it


def test_the_worlds_text_comes_back_without_bytes(embedded_tokenizer, training_text):
    texts = [document.text for document in training_text[::4]] + stories.draw_held_out()
    texts += [row.context + row.target for split in SIZES for row in people.make_rows(split)[::5]]
    first_byte, last_byte = embedded_tokenizer.convert_tokens_to_ids(["<0x00>", "<0xFF>"])
    ids = embedded_tokenizer(texts).input_ids
    assert embedded_tokenizer.batch_decode(ids) == texts
    tokens = {token for text_ids in ids for token in text_ids}
    assert not any(first_byte <= token <= last_byte or token == embedded_tokenizer.unk_token_id for token in tokens)
    assert max(len(text_ids) for text_ids in ids) < embedded_tokenizer.model_max_length


# Draws


def test_draws_are_the_same_on_every_python():
    rng = SeededRandom(7, "pinned")
    values = [rng.randrange(1000), rng.randint(-3, 3), rng.choice("abcdef"), rng.flip(0.5), rng.sample(range(9), 4)]
    assert values == [509, 1, "b", True, [8, 4, 6, 7]]
    assert (
        SeededRandom(7, "other").randrange(10**9)
        != SeededRandom(7, "pinned").randrange(10**9)
        != SeededRandom(8, "pinned").randrange(10**9)
    )


@given(st.integers(0, 99), st.integers(1, 30), st.integers(0, 30))
def test_draws_stay_in_range(seed, n, k):
    rng = SeededRandom(seed)
    assert 0 <= rng.randrange(n) < n
    assert -n <= rng.randint(-n, n) <= n
    sample = rng.sample(range(n), min(k, n))
    assert len(set(sample)) == len(sample) == min(k, n)
    assert sorted(rng.permute(range(n))) == list(range(n))
    assert rng.flip(1.0)
    assert not rng.flip(0.0)


if __name__ == "__main__":
    PINNED.write_text(json.dumps({name: compute_digest(make()) for name, make in TEXTS.items()}, indent=1) + "\n")
