"""The text pipeline: train a language model on any text, save it, and generate text from it.

from rnnfast import lm
result = lm.train(lm.TrainConfig(cell="gru", hidden_size=256, epochs=100))
ids = lm.encode_prefix("time traveller", result.vocab)
print("".join(lm.render(lm.generate(result.model, ids, 50), result.vocab)))
"""

from rnnfast.errors import UserError
from rnnfast.lm.checkpoint import Checkpoint, load_model
from rnnfast.lm.config import TrainConfig, build_model
from rnnfast.lm.data import Batches, Corpus, load_corpus, random_batches, sequential_batches
from rnnfast.lm.generate import encode_prefix, generate, render
from rnnfast.lm.model import RNNLM, RNNLMScratch
from rnnfast.lm.train import Interrupted, TrainResult, train
from rnnfast.lm.trainer import train_step, train_steps
from rnnfast.lm.vocab import Vocab

__all__ = [
    "RNNLM",
    "Batches",
    "Checkpoint",
    "Corpus",
    "Interrupted",
    "RNNLMScratch",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "Vocab",
    "build_model",
    "encode_prefix",
    "generate",
    "load_corpus",
    "load_model",
    "random_batches",
    "render",
    "sequential_batches",
    "train",
    "train_step",
    "train_steps",
]
