"""Write lightly_momentum.pt: losses and gradients of BYOL, MoCo and DINO by lightly 1.6.

    pip install lightly==1.6.0                  # in an environment of its own
    python -m tests.oracles.make_lightly_momentum

`NegativeCosineSimilarity`, -cos, of which BYOL's loss is 2 + 2 times the mean; `NTXentLoss` with a
memory bank that holds the queue; `DINOLoss` with a given centre. In float64, but for its
temperature of the teacher, which is rounded to float32: powers of 2.
"""
from pathlib import Path

import numpy
import torch


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def byol(seed):
    from lightly.loss import NegativeCosineSimilarity
    rng = numpy.random.default_rng(seed)
    case = {"predictions": normal(rng, 6, 8), "targets": normal(rng, 6, 8)}
    predictions = case["predictions"].clone().requires_grad_()
    loss = 2 + 2 * NegativeCosineSimilarity()(predictions, case["targets"])
    loss.backward()
    return case | {"loss": loss.item(), "gradient": predictions.grad}


def moco(seed, temperature):
    from lightly.loss import NTXentLoss
    rng = numpy.random.default_rng(seed)
    queue = torch.nn.functional.normalize(normal(rng, 12, 8), dim=1)
    case = {"queries": normal(rng, 5, 8), "keys": normal(rng, 5, 8), "queue": queue}
    queries = case["queries"].clone().requires_grad_()
    criterion = NTXentLoss(temperature, memory_bank_size=(12, 8)).double()
    criterion.memory_bank.bank = queue.clone()
    loss = criterion(queries, case["keys"])
    loss.backward()
    return case | {"temperature": temperature, "loss": loss.item(), "gradient": queries.grad}


def dino(seed, crops, student_temperature, teacher_temperature):
    from lightly.loss import DINOLoss
    rng = numpy.random.default_rng(seed)
    case = {"student": normal(rng, crops * 3, 10), "teacher": normal(rng, 2 * 3, 10),
            "center": normal(rng, 10) / 4}
    student = case["student"].clone().requires_grad_()
    criterion = DINOLoss(10, student_temp=student_temperature).double()
    criterion.center.copy_(case["center"])
    loss = criterion(list(case["teacher"].chunk(2)), list(student.chunk(crops)),
                     teacher_temp=teacher_temperature)
    loss.backward()
    return case | {"num_crops": crops, "student_temperature": student_temperature,
                   "teacher_temperature": teacher_temperature, "loss": loss.item(),
                   "gradient": student.grad, "center_after": criterion.center.flatten()}


def make() -> dict:
    return {"byol": [byol(0), byol(1)], "moco": [moco(0, 0.2), moco(1, 0.07)],
            "dino": [dino(0, 2, 0.1, 2 ** -4), dino(1, 5, 0.2, 2 ** -3)]}


if __name__ == "__main__":
    torch.save(make(), Path(__file__).with_name("lightly_momentum.pt"))
