// Prints how calls are split over so many threads: "CELL H B DIRECTION: threads kind groups panels" for forward and backward scans.
#include <omp.h>

#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/layer.h"

using namespace rnnfast;
using namespace rnnfast::RNNFAST_ISA;

int main(int, char** arguments) {
  const int available = std::atoi(arguments[1]);
  omp_set_num_threads(available);
  const char* const names[] = {"rnn", "relu", "lstm", "gru"};
  for (const Cell cell : {Cell::rnn_tanh, Cell::lstm, Cell::gru})
    for (const int64_t hidden : {16, 64, 256, 512, 1024})
      for (const int64_t batch : {1, 8, 16, 32, 128})
        for (const bool backward : {false, true}) {
          ScanShape s{};
          s.cell = cell;
          s.lanes = 1;
          s.steps = 35;
          s.batch = batch;
          s.rows = s.steps * batch;
          s.hidden = s.state = s.input = hidden;
          const Panels panels = backward ? plain_panels(s.state, LANES<float>) : gate_pieces(s, LANES<float>, false);
          const int64_t depth = backward ? s.gates() * s.hidden : s.state;
          const Split split = split_work(s, panels.total_vectors * depth, panels.count(), usable_threads(available),
                                         s.batch / LEAST_GROUP);
          std::printf("%s %d %d %s: %d %s %d %d\n", names[int(cell)], int(hidden), int(batch), backward ? "backward" : "forward",
                      split.threads, split.threads == 1 ? "one" : !split.together() ? "rows" : split.dealt ? "dealt" : "panels",
                      int(split.groups), int(panels.count()));
        }
}
