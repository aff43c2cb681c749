"""What TRL's DPOTrainer computes, for tests/train_parity.rs to compare with.

    train_reference.py JOBS

JOBS is a JSON file with a list of jobs, each a few steps of DPOTrainer on token
ids. Prints a JSON list of what they logged; gradients and weights go to the
files that a job names.
"""

import contextlib
import functools
import json
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
import trl
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class TokenTrainer(DPOTrainer):
    """DPOTrainer on token ids, in order, with each loss kept unrounded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class Gradients(TrainerCallback):
    """Keeps the first step's gradients, clipped, and each step's norm in fp64."""

    first = None

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        norms = [parameter.grad.double().norm() for parameter in model.parameters()]
        self.norms.append(torch.stack(norms).norm().item())
        if self.first is None:
            self.first = {
                name: parameter.grad.clone() for name, parameter in model.named_parameters()
            }


def loss_settings(objective):
    """DPOConfig's settings for an objective of the engine's."""
    settings = dict(
        beta=objective["beta"],
        label_smoothing=objective["label_smoothing"],
        loss_type=[objective["loss"]],
        loss_weights=[1.0],
    )
    if objective["rpo_alpha"] > 0:
        settings["loss_type"].append("sft")
        settings["loss_weights"].append(objective["rpo_alpha"])
    return settings


def train(job):
    dtype = getattr(torch, job["dtype"])
    policy = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(job["reference"], dtype=dtype)
    for model in (policy, reference):
        # By this name TRL looks for the decoder ahead of the head; transformers 4 has
        # another in Gemma-3, under which there is nothing.
        model.base_model_prefix = "model"
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    dataset = datasets.Dataset.from_list(
        [{names[side]: pair[side] for side in names} for pair in job["pairs"]]
    )
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            **loss_settings(job["objective"]),
            **job["optimizer"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=job["max_grad_norm"],
            per_device_train_batch_size=job["batch"],
            # To the loss, batches that follow one another are what devices are.
            gradient_accumulation_steps=job["devices"],
            num_train_epochs=1,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
        )
        trainer = TokenTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer(job["tokenizer"]),
            callbacks=[gradients],
        )
        trainer.train()
    steps = [dict(entry) for entry in trainer.state.log_history if "rewards/margins" in entry]
    losses = torch.tensor(trainer.losses, dtype=torch.float64).view(-1, job["devices"]).mean(1)
    for entry, loss, clipped in zip(steps, losses.tolist(), gradients.norms, strict=True):
        entry["loss"] = loss
        # What grad_norm would be, had it been added up in fp64: clipping divided by it.
        clip = min(1.0, job["max_grad_norm"] / (entry["grad_norm"] + 1e-6))
        entry["grad_norm/fp64"] = clipped / clip
    save_file(contiguous(gradients.first), job["gradients"])
    save_file(contiguous(dict(trainer.model.named_parameters())), job["weights"])
    return {"steps": steps, "versions": versions(), "optimizer": optimizer(trainer)}


def optimizer(trainer):
    """The optimiser that ran: its class, and the settings of its groups of weights."""
    inner = trainer.optimizer.optimizer
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in inner.param_groups
    ]
    return {"class": type(inner).__name__, "groups": groups}


@functools.cache
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


def contiguous(tensors):
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def versions():
    return {module.__name__: module.__version__ for module in (trl, transformers, torch)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        results = [train(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(results))
