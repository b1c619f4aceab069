// y = base with the rows x at the places kept: each block lists who is kept, and writes its slice.
#include "effopt.cuh"

constexpr int THREADS = 256;  // as in the plugin

template <class T>
DEVICE void scatter_tokens(
    const T* base, const T* x, const long long* kept, int N, int C, int K, int slices, T* y) {
  constexpr int V = 16 / sizeof(T);
  const long long sample = BLOCK_X;
  const int slice = BLOCK_Y;
  base += sample * N * C, y += sample * N * C, x += sample * K * C, kept += sample * K;

  SHARED(int, row_of);  // the row of a place in x, or -1 for the row of the base
  FOR_THREADS(place, N) row_of[place] = -1;
  BARRIER;
  FOR_THREADS(row, K) row_of[kept[row]] = row;
  BARRIER;
  auto newest = [=](int place) {
    int row = row_of[place];
    return row < 0 ? base + (long long)place * C : x + (long long)row * C;
  };
  if (whole(C, base, x, y))
    copy_packs<THREADS, V>(N, C, slice, slices, y, newest);
  else
    copy_packs<THREADS, 1>(N, C, slice, slices, y, newest);
}

#define PARAMETERS(T) \
  (const T* base, const T* x, const long long* kept, int N, int C, int K, int slices, T* y)
ENTRIES(scatter_tokens, PARAMETERS, base, x, kept, N, C, K, slices, y)
