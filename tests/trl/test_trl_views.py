"""``views``: a pair is trained on in the worst of its forms."""

from __future__ import annotations

import re
from itertools import product

import pytest

pytest.importorskip("trl")

import steps
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_fixtures import (
    quiet,
    tiny_pairs,
    tiny_tokenizer,
)

from drrlhf.transformations.sayings import SELF_PRAISE
from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from drrlhf.trl.views import _drawn

METHODS = ["dpo", "reward", "encoder"]
VIEWS = ["repeated", "handle", "@other"]
BETA = 0.1
SIDES = ("chosen", "rejected")


@pytest.fixture
def made(models, tmp_path):
    def made(method, data, **options):
        kind = "dpo" if method == "dpo" else "reward"
        return steps.trainer(kind, models[method], str(tmp_path / "out"), data=data, **options)

    return made


def trained(trainer):
    """The gradient of every step, and what was logged of each."""
    trainer.train()
    (gradients,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, steps.Gradients))
    return gradients.steps, [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max()
        assert scale > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * max(float(scale), 1.0))


def pairs(n=6, **columns):
    """Pairs whose answers also have another form in a column, some of them."""
    other = tiny_pairs(n, seed=5)
    forms = {
        "chosen@other": [text if i % 3 else None for i, text in enumerate(other["chosen"])],
        "rejected@other": list(other["rejected"]),
        "prompt@other": list(other["prompt"]),
    }
    return tiny_pairs(n, **forms | columns)


def scorers(method, models):
    """The score of (prompt, answer) by transformers alone, one text at a time, unpadded: of DPO
    the log-ratio of the policy and the reference."""
    tokenizer = tiny_tokenizer()

    if method != "dpo":
        place, end = (models["encoder"], "") if method == "unended" else (models[method], "<eos>")
        model = AutoModelForSequenceClassification.from_pretrained(place).eval()
        return lambda prompt, answer: model(
            **tokenizer(prompt + answer + end, return_tensors="pt")
        ).logits.item()
    policy = steps.away(models[method]).eval()
    reference = AutoModelForCausalLM.from_pretrained(models[method]).eval()

    def ratio(prompt, answer, start=None):
        ids = tokenizer(prompt + answer + "<eos>", return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"]) if start is None else start
        found = []
        for model in (policy, reference):
            logps = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            found.append(logps.gather(1, ids[0, start:, None]).sum().item())
        return found[0] - found[1]

    return ratio


def worst(rows, forms, method, models):
    """Rows in their worst form, found by trying every combination; and the mean of their losses. A
    label of probability 0 is the other way round, and its pair's worst form too."""
    score = torch.no_grad()(scorers(method, models))
    slope = BETA if method == "dpo" else 1.0
    found, losses = [], []
    for row, drawn in zip(rows, forms, strict=True):
        answers = [form for form in drawn if not form.prompt]
        tried = list(
            product(
                [row["prompt"]],
                {row["chosen"], *(form.row["chosen"] for form in answers)},
                {row["rejected"], *(form.row["rejected"] for form in answers)},
            )
        ) + [tuple(form.row[k] for k in ("prompt", "chosen", "rejected")) for form in drawn]
        sign = 1 if row.get("p_chosen", 1) else -1
        needed = row.get("margin", 0)
        tried = [one for one in tried if one[1] != one[2]]  # equal answers: nothing to train on
        margins = [sign * (score(p, c) - score(p, r) - needed) for p, c, r in tried]
        best = min(range(len(tried)), key=margins.__getitem__)
        found.append(tried[best])
        losses.append(float(-torch.nn.functional.logsigmoid(torch.tensor(slope * margins[best]))))
    return found, sum(losses) / len(losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [VIEWS, [*VIEWS, "prompt@other"]], ids=["answers", "prompts"])
def test_a_step_is_that_of_the_worst_forms(made, models, method, names):
    data = pairs()
    options = {"per_device_train_batch_size": 6, "learning_rate": 0.0}
    trainer = made(method, data, views=names, views_per_pair=3, **options)
    forms = [trainer._view_texts.draw(i, 0).forms for i in range(len(data))]
    expected, loss = worst(list(data), forms, method, models)
    gradients, logs = trained(trainer)
    assert float(logs[0]["views/loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(logs[0]["loss"]) == pytest.approx(loss, rel=1e-4)
    columns = dict(zip(("prompt", "chosen", "rejected"), zip(*expected, strict=True), strict=True))
    assert sum(a != b for a, b in zip(columns["chosen"], data["chosen"], strict=True)) >= 2
    alone, _ = trained(made(method, Dataset.from_dict(columns), **options))
    assert_same(gradients, alone)


def merging():
    """Prompts that end with w1: an answer that begins with a number makes w12 of it, one with a
    space in front does not. Either happens in either form of either answer."""
    prompts = [f"{text} w1" for text in tiny_pairs(8)["prompt"]]
    columns = [tiny_pairs(8, seed=seed)[side] for seed in (0, 5) for side in ("chosen", "rejected")]
    names = ("chosen", "rejected", "chosen@other", "rejected@other")
    data = {"prompt": prompts}
    for number, (name, texts) in enumerate(zip(names, columns, strict=True)):
        bit = number % 3
        data[name] = [f"{number if (i >> bit) % 2 else ''} {t}" for i, t in enumerate(texts)]
    return Dataset.from_dict(data)


def start(prompt, *answers):
    """Where TRL lets answers of one row begin."""
    tokenizer = tiny_tokenizer()
    texts = [tokenizer(text)["input_ids"] for text in (prompt, *(prompt + a for a in answers))]
    return min(
        next((i for i, (a, b) in enumerate(zip(texts[0], text)) if a != b), len(texts[0]))
        for text in texts[1:]
    )


def test_answers_begin_where_a_row_of_the_two_would(made, models):
    """A prompt and an answer may merge into one token; the other answer then begins there, too."""
    data, score = merging(), torch.no_grad()(scorers("dpo", models))
    options = {"per_device_train_batch_size": 8, "learning_rate": 0.0}
    trainer = made("dpo", data, views=["@other"], views_per_pair=1, **options)
    taken, losses, starts = [], [], set()
    for row in data:
        prompt, tried = row["prompt"], []
        for chosen, rejected in product(*((row[s], row[f"{s}@other"]) for s in SIDES)):
            at = start(prompt, chosen, rejected)
            margin = score(prompt, chosen, at) - score(prompt, rejected, at)
            tried.append((margin, chosen, rejected))
            starts.add(len(tiny_tokenizer()(prompt)["input_ids"]) - at)
        margin, *answers = min(tried)
        taken.append({"prompt": prompt, **dict(zip(SIDES, answers, strict=True))})
        losses.append(-torch.nn.functional.logsigmoid(torch.tensor(BETA * margin)).item())
    assert starts == {0, 1}
    gradients, logs = trained(trainer)
    assert float(logs[0]["views/loss"]) == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert 0.2 < float(logs[0]["views/taken/@other"]) < 0.8
    assert float(logs[0]["views/distinct"]) == 1
    alone, _ = trained(made("dpo", Dataset.from_list(taken), **options))
    assert_same(gradients, alone)


def test_answers_begin_where_their_row_does_without_scores(made):
    data = merging()
    options = {"per_device_train_batch_size": 8, "learning_rate": 0.0}
    for option in ({"view_ambiguity": "mean"}, {"views_scored_from": 0.9, "max_steps": 2}):
        trainer = made("dpo", data, views=["@other"], views_per_pair=1, **options | option)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        trainer.model.train()
        picked = trainer._of_worst_views(batch)
        tokenizer = tiny_tokenizer()
        for i, row in enumerate(data):
            sides = [picked["input_ids"][j] for j in (i, 8 + i)]
            ids = [
                {
                    tuple(tokenizer(row["prompt"] + row[name] + "<eos>")["input_ids"]): row[name]
                    for name in (side, f"{side}@other")
                }
                for side in SIDES
            ]
            counts = [int(picked["attention_mask"][j].sum()) for j in (i, 8 + i)]
            texts = [
                known[tuple(side[:count].tolist())]
                for known, side, count in zip(ids, sides, counts, strict=True)
            ]
            for j in (i, 8 + i):
                assert int(picked["completion_mask"][j].argmax()) == start(row["prompt"], *texts)


@pytest.mark.parametrize("method", METHODS)
def test_two_answers_that_became_equal_are_no_pair(made, models, method):
    """Their loss is log 2 whatever the model: it must not be the worst form of a right pair."""
    score = torch.no_grad()(scorers(method, models))
    texts = {side: [] for side in ("rejected", "other", "chosen")}
    for prompt in (prompts := tiny_pairs(6)["prompt"][:]):
        ranked = sorted(tiny_pairs(7, seed=1)["chosen"], key=lambda text: score(prompt, text))
        for side, text in zip(texts, (ranked[0], ranked[3], ranked[-1]), strict=True):
            texts[side].append(text)
    others = texts.pop("other")
    forms = {"chosen@other": others, "rejected@other": others}
    data = Dataset.from_dict({"prompt": prompts, **texts, **forms})
    options = {"per_device_train_batch_size": 6, "learning_rate": 0.0, "views": ["@other"]}
    trainer = made(method, data, views_per_pair=1, **options)
    forms = [one.forms for one in drawn(trainer, 0)]
    _, loss = worst(list(data), forms, method, models)
    _, logs = trained(trainer)
    assert loss < 0.69 and float(logs[0]["views/pairs_right"]) == 1
    assert float(logs[0]["views/loss"]) == pytest.approx(loss, rel=1e-4)
    any_form = made(method, data, views_per_pair=1, view_ambiguity="mean", **options)
    batch = any_form.data_collator([any_form.train_dataset[i] for i in range(6)])["views"]
    pairs_taken = batch["text"][batch["chosen"][:, 0]], batch["text"][batch["rejected"][:, 0]]
    assert bool((pairs_taken[0] != pairs_taken[1]).all())


def test_margins_and_labels_are_those_of_the_pair(made, models):
    data = pairs(margin=[0.0, 1.0, -1.0, 0.5, 2.0, 0.0], p_chosen=[1, 0, 1, 0, 0, 1])
    options = {"per_device_train_batch_size": 6, "learning_rate": 0.0}
    trainer = made("reward", data, views=VIEWS, **options)
    forms = [one.forms for one in drawn(trainer, 0)]
    _, loss = worst(list(data), forms, "reward", models)
    _, logs = trained(trainer)
    assert float(logs[0]["views/loss"]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("method", ["reward", "encoder"])
@pytest.mark.parametrize("scored", [1.0, 0.5])
def test_another_form_is_pulled_to_what_the_original_was_scored(made, models, method, scored):
    """c (r - r0)² of both answers of the scored pairs, as transformers alone gives them."""
    data, c = pairs(8), 0.3
    options = {"per_device_train_batch_size": 8, "learning_rate": 0.0, "views": VIEWS}
    options["views_scored"] = scored
    plain, logs = trained(made(method, data, **options))
    trainer = made(method, data, view_consistency_coefficient=c, **options)
    every = drawn(trainer, 0)
    assert {one.scored for one in every} == ({True} if scored == 1 else {True, False})
    pulled, pulled_logs = trained(trainer)
    rows = [row for row, one in zip(data, every, strict=True) if one.scored]
    forms = [one.forms for one in every if one.scored]
    taken, _ = worst(rows, forms, method, models)
    model = AutoModelForSequenceClassification.from_pretrained(models[method]).eval()
    tokenizer, penalties = tiny_tokenizer(), []
    for row, (prompt, *answers) in zip(rows, taken, strict=True):
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            now, original = (
                model(**tokenizer(f"{prompt}{text}<eos>", return_tensors="pt")).logits[0, 0]
                for text in (answer, row[side])
            )
            penalties.append(c * (now - original.detach()).square())
    penalty = torch.stack(penalties).sum() / len(data)
    expected = torch.autograd.grad(penalty, [p for p in model.parameters() if p.requires_grad])
    expected = torch.cat([gradient.flatten() for gradient in expected])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(pulled[0] - plain[0], expected, rtol=1e-3, atol=3e-6)
    difference = float(pulled_logs[0]["loss"]) - float(logs[0]["loss"])
    assert difference == pytest.approx(penalty.item(), rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.3"])
def test_a_step_is_the_same_however_it_is_cut_and_laid_out(made, method, ambiguity):
    data = pairs(8, weight=[1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    options = {"ambiguity": ambiguity, "views": [*VIEWS, "prompt_preamble"], "max_steps": 2}
    whole, _ = trained(made(method, data, per_device_train_batch_size=8, **options))
    layouts = [{}]
    if method != "encoder":
        layouts += [{"padding_free": True}, {"share_prompts": False}, {"share_prompts": True}]
    for layout in layouts:
        cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | layout
        found, _ = trained(made(method, data, **options, **cut))
        assert_same(found, whole)


# -- what is drawn ---------------------------------------------------------------------------------


def drawn(trainer, epoch):
    return [trainer._view_texts.draw(i, epoch) for i in range(len(trainer._view_texts.data))]


def test_views_are_drawn_by_seed_epoch_and_row_alone(made):
    names = ["typos", "dropped_words", "doubled_words", "prompt_typos"]
    first = made("reward", tiny_pairs(6), views=names)
    same = made("reward", tiny_pairs(6), views=names, per_device_train_batch_size=1)
    other = made("reward", tiny_pairs(6), views=names, seed=1)
    assert drawn(first, 3) == drawn(same, 3)
    assert drawn(first, 3) != drawn(first, 4)
    assert drawn(first, 3) != drawn(other, 3)
    for one in drawn(first, 0):
        assert len(one.forms) <= 3 and one.scored and 0 <= one.number < 1


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1}], ids=["here", "workers"])
def test_every_epoch_has_its_views_and_a_resumed_run_those_of_the_saved_one(
    models, tmp_path, made, workers
):
    names = ["repeated", "quotes", "handle", "url"]
    options = {"views": names, "views_per_pair": 1, "view_ambiguity": "mean", "max_steps": 6}
    options |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = made("reward", tiny_pairs(4), **options, **workers)
    whole, logs = trained(trainer)
    told = []
    for epoch in range(3):  # of two steps, each of four answers
        both = logs[2 * epoch : 2 * epoch + 2]
        told.append([sum(4 * float(log[f"views/taken/{name}"]) for log in both) for name in names])
        taken = [name for one in drawn(trainer, epoch) for f in one.forms for name in f.names]
        assert told[-1] == [taken.count(name) for name in names]
    assert told[0] != told[1] or told[1] != told[2]
    again = made("reward", tiny_pairs(4), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    (kept,) = (c for c in again.callback_handler.callbacks if isinstance(c, steps.Gradients))
    assert_same(kept.steps, whole[4:])
    other = made("reward", tiny_pairs(4), **options | {"views": names[:3]})
    with pytest.raises(ValueError, match="saved with views"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_without_scores_every_combination_is_as_likely(made):
    """Two forms of either answer (one of them clean): four combinations, by draws of 2000 epochs;
    five standard errors of a share are 5 sqrt(3 / 16 / 2000) = 0.048."""
    for options in ({"view_ambiguity": "mean"}, {"views_scored": 0.0}):
        trainer = made("reward", tiny_pairs(1), views=["handle"], views_per_pair=1, **options)
        found = []
        for epoch in range(2000):
            ((forms, scored, _),) = drawn(trainer, epoch)
            assert not scored
            found.append(forms[0].names if forms else (None, None))
        shares = [found.count(names) / 2000 for names in product([None, "handle"], repeat=2)]
        assert sum(shares) == 1
        assert shares == pytest.approx([0.25] * 4, abs=0.048)


def test_a_set_that_spreads_its_weight_draws_by_it(made):
    """With a temperature that makes all views alike, all of them are taken in the long run."""
    options = {"views": ["handle", "repeated"], "views_per_pair": 2, "max_steps": 60}
    options |= {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    _, logs = trained(
        made("reward", tiny_pairs(8), view_ambiguity="kl:temperature=1000", **options)
    )
    for name in ("clean", "handle", "repeated"):
        share = sum(float(log[f"views/taken/{name}"]) for log in logs) / len(logs)
        assert share == pytest.approx(1 / 3, abs=0.06)  # of 960 answers: 4 standard errors
    options["max_steps"] = 4
    _, logs = trained(made("reward", tiny_pairs(8), view_ambiguity="max", **options))
    worst = [float(log["views/loss"]) for log in logs]
    assert all(one > float(log["views/clean_loss"]) for one, log in zip(worst, logs, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_views_are_scored_from_a_share_of_training_on(made, monkeypatch, method):
    """The last three of six steps are those of a run that scores from the beginning. Before them no
    policy scores: a reference alone reads the forms that are taken."""
    options = {"views": ["handle", "repeated"], "views_per_pair": 2, "learning_rate": 0.0}
    options |= {"max_steps": 6, "per_device_train_batch_size": 4}
    expected, _ = trained(made(method, tiny_pairs(8), **options))
    trainer = made(method, tiny_pairs(8), views_scored_from=0.5, **options)
    read, in_parts = [], trainer._in_parts

    def counted(every, views, pairs, score):
        read.append(sum(int((views[side][pairs] >= 0).sum()) for side in ("chosen", "rejected")))
        return in_parts(every, views, pairs, score)

    monkeypatch.setattr(trainer, "_in_parts", counted)
    found, logs = trained(trainer)
    assert_same(found[3:], expected[3:])
    assert [("views/loss" in log) for log in logs] == [False] * 3 + [True] * 3
    before, after = (3, 6) if method == "dpo" else (0, 3)
    assert read[:before] == [8] * before
    assert len(read[before:]) == after
    assert min(read[before:]) > 8
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in zip(found[:3], expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("share", [True, False])
def test_forms_are_scored_in_parts_as_long_as_the_batch(made, monkeypatch, method, size, share):
    """Of four forms of each answer of one or two pairs."""
    if method == "encoder" and share:
        return
    options = {"views": ["handle", "repeated", "quotes"], "per_device_train_batch_size": size}
    options |= {"views_per_pair": 3, "share_prompts": share, "max_steps": 2}
    trainer = made(method, tiny_pairs(4), **options)
    calls, score = [], trainer._score_sequences

    def counted(model, inputs):
        calls.append(len(inputs["input_ids"]))
        return score(model, inputs)

    monkeypatch.setattr(trainer, "_score_sequences", counted)
    trained(trainer)
    assert len(calls) == 2 * 4 and max(calls) <= 2 * size
    assert sum(calls) > 2 * 2 * size  # and there are views


def test_before_views_are_scored_every_one_is_as_likely(made):
    options = {"views": ["handle", "repeated"], "views_per_pair": 2, "max_steps": 60}
    options |= {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    _, logs = trained(made("reward", tiny_pairs(8), views_scored_from=0.999, **options))
    for name in ("clean", "handle", "repeated"):
        share = sum(float(log[f"views/taken/{name}"]) for log in logs) / len(logs)
        assert share == pytest.approx(1 / 3, abs=0.06)  # of 960 answers: 4 standard errors


def test_the_share_of_pairs_that_are_scored(made):
    trainer = made("dpo", tiny_pairs(8), views=["handle"], views_scored=0.25)
    shares = [one.scored for epoch in range(200) for one in drawn(trainer, epoch)]
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.05)
    _, logs = trained(trainer)
    assert logs


def test_metrics_of_several_batches_count_by_their_pairs(made, monkeypatch):
    """Batches have different numbers of scored pairs and of views."""
    options = {"views": ["handle", "whitespace"], "views_scored": 0.5, "views_per_pair": 2}
    options |= {"learning_rate": 0.0, "per_device_train_batch_size": 3, "max_steps": 4}
    trainer = made("reward", tiny_pairs(9), logging_steps=1, **options)
    counts, step = [], trainer._of_worst_views

    def counted(batch):
        views = batch["views"]
        counts.append((int(views["scored"].sum()), int(views["drawn"])))
        return step(batch)

    monkeypatch.setattr(trainer, "_of_worst_views", counted)
    _, single = trained(trainer)
    assert len({scored for scored, _ in counts} - {0}) > 1 and len({d for _, d in counts}) > 1
    _, (log,) = trained(made("reward", tiny_pairs(9), logging_steps=4, **options))
    for name, which in (("loss", 0), ("clean_loss", 0), ("pairs_right", 0), ("distinct", 1)):
        weights = [one[which] for one in counts]
        found = [float(one.get(f"views/{name}", 0.0)) for one in single]
        mean = sum(w * one for w, one in zip(weights, found, strict=True)) / sum(weights)
        assert float(log[f"views/{name}"]) == pytest.approx(mean, rel=1e-5), name
    taken = [float(one["views/taken/clean"]) for one in single]  # of as many answers each
    assert float(log["views/taken/clean"]) == pytest.approx(sum(taken) / 4, rel=1e-5)


def test_a_form_without_a_number_is_trained_on(made, monkeypatch):
    """A model that gives NaN for a form must not get away with the others."""
    trainer = made("reward", tiny_pairs(4), views=["handle"], views_per_pair=1)
    score, handle = trainer._score_sequences, tiny_tokenizer()("@user")["input_ids"][0]

    def broken(model, inputs):
        found = score(model, inputs)
        return torch.where((inputs["input_ids"] == handle).any(1, keepdim=True), torch.nan, found)

    monkeypatch.setattr(trainer, "_score_sequences", broken)
    _, logs = trained(trainer)
    assert str(logs[0]["views/loss"]) == "nan"
    assert float(logs[0]["views/taken/handle"]) >= 0.5


def test_what_tokenizes_alike_is_no_view(made):
    """The tokenizer splits at white space: doubled spaces say nothing new."""
    _, logs = trained(made("reward", tiny_pairs(8), views=["whitespace", "quotes"]))
    assert 0 < float(logs[0]["views/distinct"]) < 1
    assert float(logs[0]["views/taken/whitespace"]) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scored", [1.0, 0.0])
def test_two_equal_answers_are_trained_on_as_they_are(made, method, scored):
    """No form of them is the better one; a cut may make them equal, too."""
    options = {"views": ["handle", "repeated"], "views_scored": scored, "learning_rate": 0.0}
    options["per_device_train_batch_size"] = 4
    texts = ["so do we", "the film was great", "not very good", "yes"]
    data = Dataset.from_dict({"prompt": ["how was it"] * 4, "chosen": texts, "rejected": texts})
    if method == "dpo":  # cuts
        data = data.map(lambda row: {"chosen": " w1 w2 w3 w4", "rejected": " w1 w2 w3 w5"})
        options["max_length"] = 6
    _, logs = trained(made(method, data, **options))
    assert float(logs[0]["views/taken/clean"]) == 1
    assert float(logs[0]["loss"]) == pytest.approx(0.693147, rel=1e-5)


def test_views_that_do_not_fit_are_counted(made):
    """Twenty words behind two and before the end fit into 25 tokens, behind six they do not."""
    answers = [" w2", " w2", " w2" * 5, " w2" * 5]
    rejected = [answer.replace("2", "3") for answer in answers]
    data = Dataset.from_dict({"prompt": ["w1"] * 4, "chosen": answers, "rejected": rejected})
    options = {"views": ["true_is_true"], "views_per_pair": 1, "max_length": 25}
    _, logs = trained(made("reward", data, **options))
    assert float(logs[0]["views/distinct"]) == 0.5


def test_data_that_were_tokenized_before_have_views_of_their_texts(made, models):
    """As encoders need it whose tokenizers have no end token."""
    tokenizer = tiny_tokenizer(with_eos=False)

    def tokenize(row, end=""):
        texts = {f"{side}_ids": row["prompt"] + row[side] + end for side in ("chosen", "rejected")}
        return {name: tokenizer(text)["input_ids"] for name, text in texts.items()}

    options = {"views": VIEWS, "trainer_processing_class": tokenizer, "learning_rate": 0.0}
    options |= {"per_device_train_batch_size": 6}
    data = pairs().map(tokenize)
    trainer = made("encoder", data, **options)
    forms = [one.forms for one in drawn(trainer, 0)]
    _, logs = trained(trainer)
    assert float(logs[0]["views/distinct"]) > 0.9
    _, expected = worst(list(data), forms, "unended", models)
    assert float(logs[0]["views/loss"]) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="views: the ids of train_dataset are not what"):
        made("encoder", pairs().map(tokenize, fn_kwargs={"end": " w1"}), **options)


def test_evaluation_is_of_the_pairs_as_they_are(made):
    data = tiny_pairs(8)
    options = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    logs = []
    for views in (None, ["handle", "repeated"]):
        trainer = made("reward", data, views=views, trainer_eval_dataset=data, **options)
        trainer.train()
        logs += [log for log in trainer.state.log_history if "eval_loss" in log]
    assert float(logs[0]["eval_loss"]) == pytest.approx(float(logs[1]["eval_loss"]), rel=1e-6)
    assert not any("views" in name for name in logs[1])
    again = trainer.evaluate(trainer.train_dataset)  # prepared for training
    assert again["eval_loss"] == pytest.approx(float(logs[0]["eval_loss"]), rel=1e-6)


def test_evaluation_data_that_are_called_train_are_not_trained_on(made):
    data, other = tiny_pairs(8), tiny_pairs(12, seed=3)
    options = {"views": ["handle"], "trainer_eval_dataset": {"train": other}}
    trainer = made("reward", data, eval_strategy="steps", eval_steps=1, **options)
    assert trainer._view_texts.data["chosen"][:] == data["chosen"][:]
    trained(trainer)
    trainer.evaluate({"train": other})
    assert trainer._view_texts.data["chosen"][:] == data["chosen"][:]


def test_a_number_that_was_rounded_up_draws_the_last_form():
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    assert _drawn(weights, torch.ones(2, dtype=torch.bfloat16)).tolist() == [1, 2]
    assert _drawn(weights, torch.zeros(2)).tolist() == [0, 2]


def test_messages_are_changed_where_they_answer(made):
    data = Dataset.from_dict(
        {
            "chosen": [said("how was it", "great")] * 4,
            "rejected": [said("how was it", "not good")] * 4,
        }
    )
    for method in ("dpo", "reward"):
        trainer = made(method, data, views=["handle", "prompt_preamble"], views_per_pair=8)
        kinds = set()
        for form in drawn(trainer, 0)[0].forms:
            question = form.row.get("prompt", form.row["chosen"])[0]["content"]
            answer = form.row["chosen"][-1]["content"]
            kinds.add((form.prompt, question == "how was it", answer))
        assert kinds == {(False, True, "@user great"), (True, False, "great")}
        trained(trainer)


def test_views_take_a_rate_and_may_be_biases(made):
    names = ["doubled_words:1", "self_praise"]
    trainer = made("reward", tiny_pairs(6), views=names, views_per_pair=4)
    for index, one in enumerate(drawn(trainer, 0)):
        answer = trainer._view_texts.row(index)["chosen"]
        doubled = re.sub("[a-z]{4,}", r"\g<0> \g<0>", answer)
        assert {form.row["chosen"] for form in one.forms} - {doubled} == {answer + SELF_PRAISE}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (
            "reward",
            {"view_consistency_coefficient": 0.1, "view_ambiguity": "mean"},
            "view_consistency_coefficient: expected views that are scored, .*'mean'",
        ),
        ("reward", {"view_consistency_coefficient": -1.0}, "expected a finite number >= 0, got -1"),
        ("reward", {"views": ["typo"]}, "views: expected names among typos, .* got 'typo'"),
        ("reward", {"views": "typos, case"}, "views: expected names among .* got 'case'"),
        ("reward", {"views": ["@"]}, "got '@'"),
        ("dpo", {"views": "typos, url,typos"}, "expected each name once, got 'typos' twice"),
        ("reward", {"views": ["typos:2"]}, r"views: expected typos:RATE .* got 'typos:2'"),
        (
            "reward",
            {"views": "typos, empty"},
            "views: expected a form or bias, got 'empty', which is of the kind attack; use one of",
        ),
        ("reward", {"views": ["@none"]}, "'@none' needs the column 'chosen@none' or"),
        ("reward", {"views": ["prompt@none"]}, "needs the column 'prompt@none', and"),
        ("reward", {"views_per_pair": 0}, "views_per_pair: expected >= 1, got 0"),
        (
            "reward",
            {"views_scored_from": 1.0},
            r"views_scored_from: expected a share of training in \[0, 1\), got 1.0",
        ),
        ("reward", {"views_scored": 1.5}, r"views_scored: expected a share in \[0, 1\], got 1.5"),
        ("dpo", {"view_ambiguity": "chi2:1"}, "view_ambiguity: expected 'max', 'mean'"),
        ("dpo", {"view_ambiguity": "min"}, "view_ambiguity: expected 'max', 'mean'"),
        ("dpo", {"precompute_ref_log_probs": True}, "with precompute_ref_log_probs=True"),
        ("dpo", {"ld_alpha": 0.0}, "with ld_alpha"),
        ("reward", {"accelerator_config": {"split_batches": True}}, "with dispatch_batches or"),
        (
            "reward",
            {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"},
            "workers that are forked, got the start method 'spawn'",
        ),
        ("dpo", {"use_weighting": True}, "with use_weighting=True"),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, "'sft'"),
    ],
)
def test_what_is_wrong_is_named(models, tmp_path, method, options, words):
    kinds = {"dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig)}
    trainer, config = kinds[method]
    with pytest.raises(ValueError, match=words):
        trainer(
            model=models[method],
            args=config(str(tmp_path), **quiet(**{"views": ["typos"]} | options)),
            train_dataset=tiny_pairs(8),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: tiny_pairs(8).to_iterable_dataset(), "load it without streaming"),
        (
            lambda: Dataset.from_dict({"chosen_ids": [[7, 8]] * 4, "rejected_ids": [[9]] * 4}),
            "as they were before tokenization",
        ),
        (
            lambda: tiny_pairs(8, chosen_input_ids=[[7]] * 8, rejected_input_ids=[[8]] * 8),
            "has a name that TRL no longer uses",
        ),
        (
            lambda: tiny_pairs(8).remove_columns("prompt"),
            "'prompt_typos' needs a column 'prompt' in train_dataset",
        ),
    ],
)
def test_data_without_texts_are_refused(models, tmp_path, data, words):
    with pytest.raises(ValueError, match=words):
        RewardTrainer(
            model=models["reward"],
            args=RewardConfig(str(tmp_path), **quiet(views=["typos", "prompt_typos"], max_steps=1)),
            train_dataset=data(),
            processing_class=tiny_tokenizer(),
        )


def said(*texts):
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("form", "right"),
    [
        (said("how was it", "really great"), True),
        (None, True),
        ([], True),
        (said("how was the film", "really great"), False),
        (said("how was it"), False),
        (said("how was it", "really great")[1:], False),
    ],
)
def test_another_form_of_a_conversation_begins_as_its_row(made, form, right):
    """A reward model reads it whole: the answer alone would be one to no question."""
    talk = said("how was it", "really great")
    data = Dataset.from_dict(
        {
            "chosen": [said("how was it", "great")] * 4,
            "rejected": [said("how was it", "not good")] * 4,
            "chosen@other": [talk, talk, form, talk],
        }
    )
    if right:
        trained(made("reward", data, views=["@other"]))
        return
    with pytest.raises(ValueError, match=r"column chosen@other of .* in row 2; write them out"):
        made("reward", data, views=["@other"])


def test_texts_that_hold_the_prompt_are_warned_of_once(made, caplog):
    """DPO takes what both answers begin with for the prompt, the beginning of an answer too."""
    data = tiny_pairs(4)
    whole = data.map(lambda row: {s: row["prompt"] + " so " + row[s] for s in SIDES})
    options = {"views": ["handle", "url"], "views_per_pair": 2}
    for method, given, times in (("dpo", whole, 1), ("dpo", data, 0), ("reward", whole, 0)):
        caplog.clear()
        columns = given.remove_columns("prompt") if given is whole else given
        trained(made(method, columns, **options))
        assert sum("no column 'prompt'" in one.message for one in caplog.records) == times


def test_other_forms_of_answers_that_hold_the_prompt_are_refused(models, tmp_path):
    """DPO takes the prompt out of the answers, and nobody out of their other forms."""
    data = pairs(8).map(lambda row: {s: row["prompt"] + row[s] for s in ("chosen", "rejected")})
    with pytest.raises(ValueError, match="'@other' needs a column 'prompt'"):
        DPOTrainer(
            model=models["dpo"],
            args=DPOConfig(str(tmp_path), **quiet(views=["@other"], max_steps=1)),
            train_dataset=data.remove_columns("prompt"),
            processing_class=tiny_tokenizer(),
        )
