"""The d2l chapter "Implementation of Recurrent Neural Networks from Scratch", its recurrence run by rnnfast's scan.

python examples/rnn_scratch.py [epochs]
"""

import sys

import torch

from rnnfast import d2l

batch_size, num_steps, num_hiddens, lr = 32, 35, 512, 1
num_epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
device = d2l.try_gpu()


def get_params(vocab_size: int, num_hiddens: int, device: torch.device) -> list[torch.Tensor]:
    """The five parameters."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device) * 0.01

    W_xh = normal(vocab_size, num_hiddens)
    W_hh = normal(num_hiddens, num_hiddens)
    b_h = torch.zeros(num_hiddens, device=device)
    W_hq = normal(num_hiddens, vocab_size)
    b_q = torch.zeros(vocab_size, device=device)
    return [parameter.requires_grad_() for parameter in (W_xh, W_hh, b_h, W_hq, b_q)]


# The book's `rnn` is a Python loop over time. d2l.rnn is the same recurrence in one call; the book's runs here, too.
train_iter, vocab = d2l.load_data_time_machine(batch_size, num_steps)
net = d2l.RNNModelScratch(len(vocab), num_hiddens, device, get_params, d2l.init_rnn_state, d2l.rnn)
print(d2l.predict_ch8("time traveller ", 10, net, vocab, device))
d2l.train_ch8(net, train_iter, vocab, lr, num_epochs, device)
