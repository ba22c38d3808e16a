"""The d2l chapter "Concise Implementation of Recurrent Neural Networks", with rnnfast's layer in place of torch.nn's.

python examples/rnn_concise.py [epochs]
"""

import sys

import rnnfast
from rnnfast import d2l

batch_size, num_steps, num_hiddens, lr = 32, 35, 256, 1
num_epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
device = d2l.try_gpu()

train_iter, vocab = d2l.load_data_time_machine(batch_size, num_steps)
layer = rnnfast.RNN(len(vocab), num_hiddens)  # or rnnfast.GRU, rnnfast.LSTM
net = d2l.RNNModel(layer, vocab_size=len(vocab)).to(device)
print(d2l.predict_ch8("time traveller", 10, net, vocab, device))
d2l.train_ch8(net, train_iter, vocab, lr, num_epochs, device)
