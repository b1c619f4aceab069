// The tokens with the highest scores, in their old order. Every block of a sample ranks them by
// counting who is ahead, and takes its slice of their rows.
#include "effopt.cuh"

using place_t = unsigned short;

constexpr int THREADS = 256;  // as in the plugin
constexpr float HIGH = 3e38f;

// Scores as they rank: protected tokens high, and what is no number above all.
DEVICE void read_scores(const float* score, int N, int prefix, int suffix, float* held) {
  FOR_THREADS(place, N) {
    float own = score[place];
    if (own != own) own = from_bits(0x7f800000);
    held[place] = place < prefix || place >= N - suffix ? HIGH : own;
  }
}

DEVICE void rank_scores(const float* held, int N, int keep, unsigned char* stays) {
  FOR_THREADS(place, N) {
    float own = held[place];
    int rank = 0;
    for (int other = 0; other < place; other++) rank += held[other] >= own;
    for (int other = place + 1; other < N; other++) rank += held[other] > own;
    stays[place] = rank < keep;
  }
}

DEVICE void list_kept(const unsigned char* stays, int N, place_t* kept) {
  FOR_THREADS(place, N) {
    int before = 0;
    for (int other = 0; other < place; other++) before += stays[other];
    if (stays[place]) kept[before] = place_t(place);
  }
}

template <class T>
DEVICE void prune_tokens(
    const T* x, const float* score, const float* along, int N, int C, int keep, int prefix,
    int suffix, int slices, T* y, float* along_out, long long* kept_out) {
  constexpr int V = 16 / sizeof(T);
  const long long sample = BLOCK_X;
  const int slice = BLOCK_Y;
  x += sample * N * C, y += sample * keep * C, along += sample * N;
  along_out += sample * keep, kept_out += sample * keep;

  SHARED(float, held);
  place_t* kept = reinterpret_cast<place_t*>(held + N);
  unsigned char* stays = reinterpret_cast<unsigned char*>(kept + keep);
  read_scores(score + sample * N, N, prefix, suffix, held);
  BARRIER;
  rank_scores(held, N, keep, stays);
  BARRIER;
  list_kept(stays, N, kept);
  BARRIER;
  if (slice == 0) {
    FOR_THREADS(row, keep) kept_out[row] = kept[row], along_out[row] = along[kept[row]];
  }
  auto taken = [=](int row) { return x + (long long)kept[row] * C; };
  if (whole(C, x, y))
    copy_packs<THREADS, V>(keep, C, slice, slices, y, taken);
  else
    copy_packs<THREADS, 1>(keep, C, slice, slices, y, taken);
}

#define PARAMETERS(T)                                                                          \
  (const T* x, const float* score, const float* along, int N, int C, int keep, int prefix,     \
   int suffix, int slices, T* y, float* along_out, long long* kept)
ENTRIES(prune_tokens, PARAMETERS, x, score, along, N, C, keep, prefix, suffix, slices, y,
        along_out, kept)
