// Bipartite matching and merging of a sample in one launch. Every block of a sample finds the same
// matching; blocks share the writing of its rows, so that a small batch keeps more of a GPU busy.
#include "effopt.cuh"

using place_t = unsigned short;

constexpr int THREADS = 256;                                     // as in the plugin
constexpr int PARTS = 4096;                                      // partial results of comparing
constexpr int WORK = PARTS * (sizeof(float) + sizeof(place_t));  // bytes, as in the plugin
constexpr int SHARES = 8;                                        // threads for one norm
constexpr int SIDE = 4;  // a thread compares SIDE even tokens with SIDE odd ones at a time
constexpr int NONE = -1;
constexpr float PAD = -2.0f, ONTO_PAD = -3.0f, PROTECTED = -4.0f, LOWEST = -3e38f;
constexpr float TINY = 1e-12f, LEAST = 1e-6f;

// Tokens of one sample, and which of them take no part.
struct Tokens {
  int N, prefix, suffix, ordered;
};

DEVICE bool guarded(Tokens of, int place) {
  return place < of.prefix || place >= of.N - of.suffix;
}

// The number of a place in the order of the result: prefix, even, odd, suffix, or as they stand.
DEVICE int turn_of(Tokens of, int place) {
  if (of.ordered || guarded(of, place)) return place;
  if (place % 2 == 0) return of.prefix + (place + 1) / 2 - (of.prefix + 1) / 2;
  int even = (of.N - of.suffix + 1) / 2 - (of.prefix + 1) / 2;
  return of.prefix + even + place / 2 - of.prefix / 2;
}

// What is chosen, in shared memory: source, target and next [r], head [N], kept [N - r]. The
// sources of a target are the list head[target], next[...] of ranks. `spot` [r] is the number of a
// source in the order of the result, and later, of a list's first, the row of its target.
struct Choice {
  place_t *source, *target, *spot, *kept;
  short *next, *head;
};

// --- which tokens are alike ---------------------------------------------------------------------

template <class T>
DEVICE void find_norms(const T* metric, int N, int D, float* partial, float* inverse) {
  constexpr int ROWS = WORK / int(sizeof(float)) / SHARES;
  for (int first = 0; first < N; first += ROWS) {
    int rows = N - first < ROWS ? N - first : ROWS;
    FOR_THREADS(item, rows * SHARES) {
      const T* row = metric + (long long)(first + item / SHARES) * D;
      float sum = 0.0f;
      for (int d = item % SHARES; d < D; d += SHARES) sum += real(row[d]) * real(row[d]);
      partial[item] = sum;
    }
    BARRIER;
    FOR_THREADS(row, rows) {
      float sum = 0.0f;
      for (int share = 0; share < SHARES; share++) sum += partial[row * SHARES + share];
      inverse[first + row] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
    }
    BARRIER;
  }
}

// Products of SIDE even rows with SIDE odd ones; all pairs are summed in the same order, so that
// equal rows tie.
template <class T, int V>
DEVICE void multiply(const T* const* even, const T* const* odd, int D, float (&sums)[SIDE][SIDE]) {
  for (int d = 0; d < D; d += V) {
    Pack<T, V> a[SIDE], b[SIDE];
    for (int i = 0; i < SIDE; i++) a[i] = load<T, V>(even[i] + d), b[i] = load<T, V>(odd[i] + d);
    for (int v = 0; v < V; v++)
      for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) sums[i][j] += real(a[i].at[v]) * real(b[j].at[v]);
  }
}

// How many threads share the odd tokens for one group of even ones.
DEVICE int lanes_for(int N) {
  int evens = (N + 1) / 2, groups = (evens + SIDE - 1) / SIDE, tiles = (N / 2 + SIDE - 1) / SIDE;
  int lanes = THREADS / groups;
  if (lanes > tiles) lanes = tiles;
  if (lanes > PARTS / evens) lanes = PARTS / evens;
  return lanes > 1 ? lanes : 1;
}

// The best odd token of each even one among those of a lane: parts[even * lanes + lane].
template <class T, int V>
DEVICE void compare(
    const T* metric, const float* size, const float* inverse, int D, Tokens of, int lanes,
    float* parts, place_t* partners) {
  int evens = (of.N + 1) / 2, odds = of.N / 2;
  int groups = (evens + SIDE - 1) / SIDE, tiles = (odds + SIDE - 1) / SIDE;
  FOR_THREADS(item, groups * lanes) {
    int first = item / lanes * SIDE, lane = item % lanes;
    const T *even[SIDE], *odd[SIDE];
    float best[SIDE];
    int partner[SIDE];
    for (int i = 0; i < SIDE; i++) {
      int row = first + i < evens ? first + i : evens - 1;
      even[i] = metric + 2ll * row * D, best[i] = LOWEST, partner[i] = 1;
    }
    for (int tile = lane; tile < tiles; tile += lanes) {
      for (int j = 0; j < SIDE; j++) {
        int column = tile * SIDE + j < odds ? tile * SIDE + j : odds - 1;
        odd[j] = metric + (2ll * column + 1) * D;
      }
      float sums[SIDE][SIDE] = {};
      multiply<T, V>(even, odd, D, sums);
      for (int j = 0; j < SIDE && tile * SIDE + j < odds; j++) {
        int place = 2 * (tile * SIDE + j) + 1;
        float most = guarded(of, place) ? PROTECTED : size[place] > 0.0f ? 1.0f : ONTO_PAD;
        for (int i = 0; i < SIDE; i++) {
          int row = first + i < evens ? first + i : evens - 1;
          float score = fminf(sums[i][j] * inverse[2 * row] * inverse[place], most);
          if (score > best[i]) best[i] = score, partner[i] = place;
        }
      }
    }
    for (int i = 0; i < SIDE && first + i < evens; i++) {
      parts[(first + i) * lanes + lane] = best[i];
      partners[(first + i) * lanes + lane] = place_t(partner[i]);
    }
  }
}

// Join what the lanes found; ties go to the lower place.
DEVICE void join(
    const float* parts, const place_t* partners, const float* size, Tokens of, int lanes,
    float* best, place_t* partner) {
  FOR_THREADS(row, (of.N + 1) / 2) {
    float most = LOWEST;
    int place = 1;
    for (int part = row * lanes; part < (row + 1) * lanes; part++)
      if (parts[part] > most || (parts[part] == most && partners[part] < place))
        most = parts[part], place = partners[part];
    bool fixed = guarded(of, 2 * row);
    best[row] = fixed ? PROTECTED : size[2 * row] > 0.0f ? most : PAD;
    partner[row] = place_t(place);
  }
}

// --- which of them leave ------------------------------------------------------------------------

// The r even tokens with the best partners, by counting who is ahead.
DEVICE void choose(const float* best, const place_t* partner, Tokens of, int r, Choice to) {
  int evens = (of.N + 1) / 2;
  FOR_THREADS(row, evens) {
    float own = best[row];
    int rank = 0;
    for (int other = 0; other < row; other++) rank += best[other] >= own;
    for (int other = row + 1; other < evens; other++) rank += best[other] > own;
    if (rank < r) {
      to.source[rank] = place_t(2 * row), to.target[rank] = partner[row];
      to.spot[rank] = place_t(turn_of(of, 2 * row));
    }
  }
  FOR_THREADS(place, of.N) to.head[place] = NONE;
}

// The lists of sources, and what is kept, in the order of the result.
DEVICE void arrange(Tokens of, int r, Choice to) {
  FOR_THREADS(rank, r) {
    int target = to.target[rank], before = rank - 1, after = rank + 1;
    while (before >= 0 && to.target[before] != target) before--;
    while (after < r && to.target[after] != target) after++;
    to.next[rank] = short(after < r ? after : NONE);
    if (before < 0) to.head[target] = short(rank);
  }
  FOR_THREADS(place, of.N) {
    int turn = turn_of(of, place), gone = 0;
    bool leaves = false;
    for (int rank = 0; rank < r; rank++) {
      gone += to.spot[rank] < turn;
      leaves |= to.spot[rank] == turn;
    }
    if (!leaves) to.kept[turn - gone] = place_t(place);
  }
}

DEVICE void find_spots(int K, Choice to) {
  FOR_THREADS(row, K) {
    int first = to.head[to.kept[row]];
    if (first != NONE) to.spot[first] = place_t(row);
  }
}

DEVICE float weight_of(const float* size, int place) { return fmaxf(size[place], TINY); }

DEVICE void write_choice(
    const float* size, int K, int r, Choice from, float* size_out, long long* kept,
    long long* source, long long* target) {
  FOR_THREADS(row, K) {
    int place = from.kept[row];
    float total = weight_of(size, place);
    for (int s = from.head[place]; s != NONE; s = from.next[s])
      total += weight_of(size, from.source[s]);
    kept[row] = place, size_out[row] = total < LEAST ? 0.0f : total;
  }
  FOR_THREADS(rank, r) source[rank] = from.source[rank], target[rank] = from.target[rank];
}

// --- what they become ---------------------------------------------------------------------------

// Average the rows with the sources that merge into them.
template <class T, int V>
DEVICE void average_rows(
    const T* x, const float* size, int C, int r, int slice, int slices, Choice from, T* y) {
  int packs = C / V;
  FOR_THREADS(lane, THREADS) {
    for (int at = slice * THREADS + lane; at < r * packs; at += slices * THREADS) {
      int rank = at / packs, column = at % packs * V, place = from.target[rank];
      if (from.head[place] != rank) continue;
      float total = 0.0f, sums[V] = {};
      for (int s = rank;;) {
        float weight = weight_of(size, place);
        Pack<T, V> row = load<T, V>(x + (long long)place * C + column);
        for (int v = 0; v < V; v++) sums[v] += weight * real(row.at[v]);
        total += weight;
        if (s == NONE) break;
        place = from.source[s], s = from.next[s];
      }
      Pack<T, V> mean;
      for (int v = 0; v < V; v++) mean.at[v] = rounded<T>(sums[v] / total);
      store(y + (long long)from.spot[rank] * C + column, mean);
    }
  }
}

template <class T>
DEVICE void match_merge(
    const T* metric, const T* x, const float* size, int N, int D, int C, int r, int prefix,
    int suffix, int ordered, int slices, T* y, float* size_out, long long* kept,
    long long* source, long long* target) {
  constexpr int V = 16 / sizeof(T);
  const Tokens of = {N, prefix, suffix, ordered};
  const int evens = (N + 1) / 2, K = N - r, slice = BLOCK_Y;
  const long long sample = BLOCK_X;
  metric += sample * N * D, x += sample * N * C, size += sample * N, y += sample * K * C;

  SHARED(char, room);
  float* parts = reinterpret_cast<float*>(room);
  place_t* partners = reinterpret_cast<place_t*>(parts + PARTS);
  float* inverse = reinterpret_cast<float*>(room + WORK);
  float* best = inverse + N;
  place_t* partner = reinterpret_cast<place_t*>(best + evens);
  int lanes = lanes_for(N);

  find_norms(metric, N, D, parts, inverse);
  if (whole(D, metric))
    compare<T, V>(metric, size, inverse, D, of, lanes, parts, partners);
  else
    compare<T, 1>(metric, size, inverse, D, of, lanes, parts, partners);
  BARRIER;
  join(parts, partners, size, of, lanes, best, partner);
  BARRIER;
  place_t* list = reinterpret_cast<place_t*>(room);  // partial results make room for the choice
  short* links = reinterpret_cast<short*>(list + 3 * r + K);
  Choice choice = {list, list + r, list + 2 * r, list + 3 * r, links, links + r};
  choose(best, partner, of, r, choice);
  BARRIER;
  arrange(of, r, choice);
  BARRIER;
  find_spots(K, choice);
  BARRIER;
  if (slice == 0)
    write_choice(
        size, K, r, choice, size_out + sample * K, kept + sample * K, source + sample * r,
        target + sample * r);
  auto own = [=](int row) { return x + (long long)choice.kept[row] * C; };
  auto alone = [=](int row) { return choice.head[choice.kept[row]] == NONE; };
  if (whole(C, x, y)) {
    copy_packs<THREADS, V>(K, C, slice, slices, y, own, alone);
    average_rows<T, V>(x, size, C, r, slice, slices, choice, y);
  } else {
    copy_packs<THREADS, 1>(K, C, slice, slices, y, own, alone);
    average_rows<T, 1>(x, size, C, r, slice, slices, choice, y);
  }
}

#define PARAMETERS(T)                                                                           \
  (const T* metric, const T* x, const float* size, int N, int D, int C, int r, int prefix,      \
   int suffix, int ordered, int slices, T* y, float* size_out, long long* kept, long long* source, \
   long long* target)
ENTRIES(match_merge, PARAMETERS, metric, x, size, N, D, C, r, prefix, suffix, ordered, slices, y,
        size_out, kept, source, target)
