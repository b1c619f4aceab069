// y = base with the rows x at the places kept: each block lists who is kept, and writes its slice.
#include "effopt.cuh"

constexpr int THREADS = 256;  // as in the plugin
constexpr int EACH = 4;       // loads that a thread has under way

template <class T, int V> struct alignas(V * sizeof(T)) Pack { T at[V]; };

// row_of [N] is the row of a place in x, or -1 for the row of the base.
template <class T, int V>
DEVICE void write_rows(
    const T* base, const T* x, const int* row_of, int N, int C, int slice, int slices, T* y) {
  int packs = C / V, total = N * packs, step = slices * THREADS;
  FOR_THREADS(lane, THREADS) {
    for (int start = slice * THREADS + lane; start < total; start += EACH * step) {
      Pack<T, V> held[EACH];
      for (int e = 0; e < EACH; e++) {
        int at = start + e * step < total ? start + e * step : total - 1;
        int place = at / packs, row = row_of[place];
        const T* from = row < 0 ? base + (long long)place * C : x + (long long)row * C;
        held[e] = *reinterpret_cast<const Pack<T, V>*>(from + at % packs * V);
      }
      for (int e = 0; e < EACH; e++)
        if (start + e * step < total)
          *reinterpret_cast<Pack<T, V>*>(y + (long long)(start + e * step) * V) = held[e];
    }
  }
}

template <class T>
DEVICE void scatter_tokens(
    const T* base, const T* x, const long long* kept, int N, int C, int K, int slices, T* y) {
  constexpr int V = 16 / sizeof(T);
  const long long sample = BLOCK_X;
  const int slice = BLOCK_Y;
  base += sample * N * C, y += sample * N * C, x += sample * K * C, kept += sample * K;

  SHARED(int, row_of);
  FOR_THREADS(place, N) row_of[place] = -1;
  BARRIER;
  FOR_THREADS(row, K) row_of[kept[row]] = row;
  BARRIER;
  unsigned long long bits = (unsigned long long)base | (unsigned long long)x | (unsigned long long)y;
  if (C % V == 0 && bits % 16 == 0)
    write_rows<T, V>(base, x, row_of, N, C, slice, slices, y);
  else
    write_rows<T, 1>(base, x, row_of, N, C, slice, slices, y);
}

#define PARAMETERS(T) \
  (const T* base, const T* x, const long long* kept, int N, int C, int K, int slices, T* y)
ENTRIES(scatter_tokens, PARAMETERS, base, x, kept, N, C, K, slices, y)
