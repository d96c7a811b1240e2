"""Twenty iterations of Train Long, Think Short on GSM8K rows, with a language model of your own.

python examples/gsm8k.py MODEL TRAIN.jsonl TEST.jsonl runs/gsm8k

MODEL is a folder or a name on the Hugging Face hub; rows have `question` and `answer`, whose last line is `#### 18`.
Stop it with Ctrl-C and start it again: it goes on where it was.
"""

import sys

from regimen import train
from regimen.papers.train_long_think_short import Settings, curriculum

model, train_rows, test_rows, out = sys.argv[1:5]
settings = Settings(
    world="gsm8k",
    model=model,
    train=train_rows,
    test=test_rows,
    dtype="float32",
    steps=20,
    drops=3,  # 64, 50, 40 and 32 tokens, five iterations each
    start_budget=64,
    final_budget=32,
    max_new_tokens=128,
    held_out=16,
    batch_size=16,
    group_size=4,
    evaluate_every=10,
)
outcome = train(curriculum(seed=0, s=settings), seed=0, out=out, resume=True)
for record in outcome.evaluations:
    print(record["stage"], record["step"], {name: round(value, 3) for name, value in record["metrics"].items()})
