// Distributes work among threads.
//
// OpenMP's runtime is torch's (the library is linked without one of its own): two pools of spinning
// threads would compete for the cores.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace octavo {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// Runs function(begin, end) over [0, count), in one thread where that is faster.
template <class Function>
void in_parallel(int64_t count, int64_t elements_each, const Function& function) {
  const int64_t wanted = count * elements_each / kGrainElements;
  const int threads = int(std::min<int64_t>({omp_get_max_threads(), count, wanted}));
  if (threads <= 1) return function(0, count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), of = omp_get_num_threads();
    function(count * thread / of, count * (thread + 1) / of);
  }
}

}  // namespace octavo
