// y[b, c] = sum over n of size[b, n] x[b, n, c] / max(sum over n of size[b, n], 1e-6), in float32.
//
// Neighbouring threads on neighbouring channels, and every eighth token each: few rows of x are
// enough to keep a GPU busy.
#include "effopt.cuh"

constexpr int LANES = 32, SLICES = 8;

template <class T>
DEVICE void pool_tokens(const T* x, const float* size, int N, int C, T* y) {
  int groups = (C + LANES - 1) / LANES, b = BLOCK_X / groups, first = BLOCK_X % groups * LANES;
  x += (long long)b * N * C;
  size += (long long)b * N;
  SHARED(float, sums);
  float* totals = sums + SLICES * LANES;
  FOR_THREADS(i, SLICES * LANES) {
    int slice = i / LANES, c = first + i % LANES;
    float sum = 0.0f, total = 0.0f;
    if (c < C) {
      for (int n = slice; n < N; n += SLICES) {
        total += size[n];
        sum += size[n] * real(x[(long long)n * C + c]);
      }
    }
    sums[i] = sum;
    if (i % LANES == 0) totals[slice] = total;
  }
  BARRIER;
  FOR_THREADS(lane, LANES) {
    float sum = 0.0f, total = 0.0f;
    for (int slice = 0; slice < SLICES; slice++) {
      sum += sums[slice * LANES + lane];
      total += totals[slice];
    }
    int c = first + lane;
    if (c < C) y[(long long)b * C + c] = rounded<T>(sum / fmaxf(total, 1e-6f));
  }
}

#define PARAMETERS(T) (const T* x, const float* size, int N, int C, T* y)
ENTRIES(pool_tokens, PARAMETERS, x, size, N, C, y)
