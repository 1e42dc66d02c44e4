// Which of a sequence of steps are done at once (d), recorded and replayed (r), or only replayed (p).
#include <cstdio>

#include "backends/cuda/step_recording.h"

using namespace moecalc::cuda;

namespace {

struct CountingTarget {
  struct Recording {};
  int n_record = 0;
  int n_replay = 0;

  template <class Work>
  void record(Recording&, const Work& work) {
    ++n_record;
    work();
  }
  void replay(const Recording&) { ++n_replay; }
};

void show(StepRecording<CountingTarget>& recording, const StepKey& key, int64_t n_atom = 100) {
  CountingTarget target;
  int n_done = 0;
  recording.run(target, key, n_atom, [&] { ++n_done; });
  std::putchar(target.n_replay == 0 ? (n_done == 1 ? 'd' : '?') : target.n_record == 1 ? 'r' : 'p');
}

}  // namespace

int main() {
  StepKey first;
  StepKey second;
  second.list = 1;
  StepKey third;
  third.request.atom_virial = true;
  StepRecording<CountingTarget> recording(true);
  for (const StepKey& key : {first, first, first, second, second, second, first, third, third}) {
    show(recording, key);
  }
  std::putchar(' ');
  for (int turn = 0; turn < 3; ++turn) show(recording, first, StepRecording<CountingTarget>::kMostAtoms + 1);
  std::putchar(' ');
  StepRecording<CountingTarget> off(false);
  for (int turn = 0; turn < 3; ++turn) show(off, first);
}
