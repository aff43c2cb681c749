"""TRL's side of `bench dpo`: DPOTrainer on the pairs of a job, timed.

    trl_dpo.py JOB

JOB is the JSON file that our side reads too (tests/bench/job.rs). Prints one
JSON object: what the run measured.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
import trl
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from peak import peak_bytes


class TokenTrainer(DPOTrainer):
    """DPOTrainer on token ids, in the order given."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


class Clock(TrainerCallback):
    """From when the first timed batch is about to be collated, to the last step's end."""

    def __init__(self, warm_up):
        self.warm_up = warm_up
        self.step_seconds = []

    def begin(self):
        self.begun, self.times_begun = time.perf_counter(), os.times()
        self.step_seconds = []

    def on_train_begin(self, *_, **__):
        self.begin()

    def on_step_begin(self, *_, **__):
        self.step_begun = time.perf_counter()

    def on_step_end(self, _, state, *__, **___):
        self.ended, self.times_ended = time.perf_counter(), os.times()
        self.step_seconds.append(self.ended - self.step_begun)
        if state.global_step == self.warm_up:
            self.begin()


def run(job):
    torch.set_num_threads(job["threads"])
    recipe = job["recipe"]
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[job["dtype"]]

    def load():
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)

    dataset = datasets.Dataset.from_list(
        [{f"{side}_ids": ids for side, ids in pair.items()} for pair in job["pairs"]]
    )
    clock = Clock(job["warm_up"])
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            beta=recipe["beta"],
            # With torch's own α and ε, which are the recipe's.
            optim="rmsprop",
            learning_rate=recipe["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=recipe["max_grad_norm"],
            per_device_train_batch_size=job["batch"],
            num_train_epochs=1,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=job["gradient_checkpointing"],
            # The weights are of the kind themselves; autocast on top would only cost time.
            bf16=False,
            use_cpu=True,
        )
        trainer = TokenTrainer(
            model=load(),
            ref_model=load(),
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[clock],
        )
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(steps) == job["warm_up"] + len(clock.step_seconds), trainer.state.log_history
    return {
        "seconds": clock.ended - clock.begun,
        "scoring_seconds": 0.0,
        "step_seconds": clock.step_seconds,
        "user_seconds": clock.times_ended.user - clock.times_begun.user,
        "system_seconds": clock.times_ended.system - clock.times_begun.system,
        "peak_bytes": peak_bytes(),
        "losses": [entry["loss"] for entry in steps],
        "logps_chosen": [entry["logps/chosen"] for entry in steps],
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = run(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(measured))
