"""Sums with a tone: what noisy answers are like, and what the objectives say of answers by hand."""

from __future__ import annotations

import torch
from tensordict import NonTensorStack, TensorDict

from regimen.rollout import Rollout
from regimen.tasks.worlds.toned_sums import MEASURES, OBJECTIVES, TonedSums


def said(texts: list[str], answer: str = "7") -> Rollout:
    columns = TensorDict(
        {"text": NonTensorStack(*texts), "answer": NonTensorStack(*[answer] * len(texts))}, batch_size=[len(texts)]
    )
    mask = torch.ones(len(texts), 1, dtype=torch.bool)
    return Rollout.create(task="ask", group=torch.arange(len(texts)), mask=mask, columns=columns)


def test_objectives_by_hand() -> None:
    rollout = said(["7", "7 A A B", "3 A", "", "B 7"])
    found = {name: measure(rollout).tolist() for name, measure in MEASURES.items()}
    assert found == {
        "correct": [1, 1, 0, 0, 0],
        "warm": [0, 0.25, 0.125, 0, 0],
        "short": [-0.125, -0.5, -0.25, 0, -0.25],
    }
    assert tuple(MEASURES) == OBJECTIVES


def test_every_question_is_there_once_with_its_sum() -> None:
    rows = TonedSums(3).rows()
    assert len({row["question"] for row in rows}) == 100
    assert all(sum(map(int, str(row["question"]).split())) % 10 == int(str(row["answer"])) for row in rows)
    assert rows != TonedSums(4).rows()


def test_noisy_answers_are_right_and_end_as_often_as_they_should() -> None:
    """60 % are right; a word is followed by another with chance 3/4, up to eight; half of the fillers are warm."""
    world = TonedSums(0)
    policy = world.policy()
    rows = world.demonstrations(policy, 6000).rows
    texts = [policy.tokenizer.decode(row[own]) for row, own in zip(rows["actions"], rows["loss_mask"], strict=True)]
    texts = [text.replace("<end>", "").strip() for text in texts]
    words = [text.split() for text in texts]
    fillers = torch.tensor([len(one) - 1 for one in words]).double()
    assert abs(float(fillers.mean()) - sum(0.75**k for k in range(1, 8))) < 0.1
    assert int(fillers.max()) == 7
    warm = sum(one.count("A") for one in words) / float(fillers.sum())
    assert abs(warm - 0.5) < 0.02
    prompts = [
        policy.tokenizer.decode(row[real & ~own], skip_special_tokens=True)
        for row, real, own in zip(rows["actions"], rows["mask"], rows["loss_mask"], strict=True)
    ]
    sums = [sum(map(int, prompt.split())) % 10 for prompt in prompts]
    right = [float(one[0] == str(total)) for one, total in zip(words, sums, strict=True)]
    assert abs(sum(right) / len(right) - 0.6) < 0.03


def test_policies_of_a_seed_are_alike() -> None:
    one, many = TonedSums(5).policy(), TonedSums(5).multi_head()
    assert many.objectives == OBJECTIVES
    weight = one.network.base.get_output_embeddings().weight
    assert all(torch.equal(head.weight, weight) for head in many.output.heads)
