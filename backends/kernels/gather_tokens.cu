// y[b, o, k, :] = x[b, o, index[b, k], :]; neighbouring threads on neighbouring elements.
#include "effopt.cuh"

constexpr int THREADS = 256, EACH = 4;

template <class T>
DEVICE void gather_tokens(const T* x, const long long* index, int O, int N, int I, int K, T* y) {
  int slices = (K * I - 1) / (THREADS * EACH) + 1, b = BLOCK_X / slices;
  long long outer = (long long)b * O + BLOCK_Y;
  const T* source = x + outer * N * I;
  const long long* places = index + (long long)b * K;
  T* target = y + outer * K * I;
  int first = BLOCK_X % slices * THREADS * EACH;
  FOR_THREADS(lane, THREADS) {
    for (int step = 0; step < EACH; step++) {
      int at = first + step * THREADS + lane;
      if (at < K * I) target[at] = source[places[at / I] * I + at % I];
    }
  }
}

#define PARAMETERS(T) (const T* x, const long long* index, int O, int N, int I, int K, T* y)
ENTRIES(gather_tokens, PARAMETERS, x, index, O, N, I, K, y)
