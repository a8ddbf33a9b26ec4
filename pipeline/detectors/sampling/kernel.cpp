// Multi-scale deformable attention's sampling (Deformable DETR, section 4.1) on a CPU.
//
// Compiled when it is first used (compiler.py) and called through ctypes (compiled.py). Arrays are
// contiguous float32: value (B, S, M, D) with the levels one after the other along S, locations
// (B, Q, M, L, P, 2) xy as fractions of a level's whole map, weights (B, Q, M, L, P), output
// (B, Q, M * D). Results have the same bits whatever the number of threads: each number is summed
// by one thread, in one order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

constexpr int MOST_DEPTH = 512;  // compiled.py knows it too
constexpr int GROUP = 16;        // points whose corners are found, and fetched, before any is read
constexpr int QUERIES = 64;      // of one item of the forward pass

const float zeros[MOST_DEPTH] = {};  // what a corner outside the map reads

}  // namespace

extern "C" {

struct Problem {
    const float* value;
    const float* locations;
    const float* weights;
    const int32_t* shapes;  // (L, 2) height, width
    int64_t images, cells, queries, heads, depth, levels, points;
    int64_t threads;
};

}

namespace {

// The four cells around each of a group of points: left and right of the row below, then above.
struct Corners {
    const float* cell[GROUP][4];
    float share[GROUP][4];
    float right[GROUP], above[GROUP];
};

// Work is taken item by item; a thread that cannot be started leaves its items to the others.
template <class Work>
void share_out(int64_t items, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        for (int64_t item; (item = next.fetch_add(1)) < items;) work(item);
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t i = 1; i < std::min(threads, items); ++i) helpers.emplace_back(run);
    } catch (...) {
    }
    run();
    for (auto& helper : helpers) helper.join();
}

inline Lanes load(const float* row, int lane, int depth) {
    Lanes lanes{};
    const int first = lane * LANES;
    if (first + LANES <= depth) return *reinterpret_cast<const Lanes*>(row + first);
    std::memcpy(&lanes, row + first, (depth - first) * sizeof(float));
    return lanes;
}

inline void store(float* row, int lane, int depth, Lanes lanes) {
    const int first = lane * LANES;
    if (first + LANES <= depth) {
        *reinterpret_cast<Lanes*>(row + first) = lanes;
    } else {
        std::memcpy(row + first, &lanes, (depth - first) * sizeof(float));
    }
}

inline float total(Lanes lanes) {
    typedef float Quarter __attribute__((vector_size(16)));
    Quarter sum;
    std::memcpy(&sum, &lanes, sizeof(sum));
    for (int i = 4; i < LANES; i += 4) {
        Quarter next;
        std::memcpy(&next, reinterpret_cast<const char*>(&lanes) + i * sizeof(float), sizeof(next));
        sum += next;
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// `map` is the level's first cell, `stride` the distance of two cells. Points far outside are taken
// to just outside, so that no index overflows; one that is not a number reads zeros, whose product
// with its shares is not a number either.
inline void find_corners(const float* xy, int points, int height, int width, const float* map,
                  int64_t stride, int depth, Corners& corners) {
    for (int p = 0; p < points; ++p) {
        float x = xy[2 * p] * width - 0.5f, y = xy[2 * p + 1] * height - 0.5f;
        x = x < -2.0f ? -2.0f : x > width + 1.0f ? width + 1.0f : x;
        y = y < -2.0f ? -2.0f : y > height + 1.0f ? height + 1.0f : y;
        const float floor_x = std::floor(x), floor_y = std::floor(y);
        const int column = x == x ? static_cast<int>(floor_x) : -2;
        const int row = y == y ? static_cast<int>(floor_y) : -2;
        const float right = x - floor_x, above = y - floor_y;
        const bool is_column[2] = {column >= 0 && column < width,
                                   column >= -1 && column < width - 1};
        const bool is_row[2] = {row >= 0 && row < height, row >= -1 && row < height - 1};
        const float across[2] = {1 - right, right}, up[2] = {1 - above, above};
        int64_t cell = (static_cast<int64_t>(row) * width + column) * stride;
        corners.right[p] = right;
        corners.above[p] = above;
        for (int i = 0; i < 2; ++i, cell += width * stride) {
            for (int j = 0; j < 2; ++j) {
                const bool exists = is_row[i] & is_column[j];
                corners.cell[p][2 * i + j] = exists ? map + cell + j * stride : zeros;
                corners.share[p][2 * i + j] = up[i] * across[j];
            }
        }
        for (int d = 0; d < depth; d += 16)
            for (int k = 0; k < 4; ++k) __builtin_prefetch(corners.cell[p][k] + d);
    }
}

// DEPTH 0 is any depth, known when it runs.
template <int DEPTH>
struct Pass {
    static constexpr int MOST_LANES = ((DEPTH ? DEPTH : MOST_DEPTH) + LANES - 1) / LANES;

    const Problem& problem;
    std::vector<int64_t> starts;

    explicit Pass(const Problem& p) : problem(p) {
        starts.push_back(0);
        for (int64_t level = 0; level < p.levels; ++level)
            starts.push_back(starts.back() + static_cast<int64_t>(height(level)) * width(level));
    }

    int depth() const { return DEPTH ? DEPTH : static_cast<int>(problem.depth); }
    int lanes() const { return DEPTH ? MOST_LANES : (depth() + LANES - 1) / LANES; }
    int64_t stride() const { return problem.heads * depth(); }
    int height(int64_t level) const { return problem.shapes[2 * level]; }
    int width(int64_t level) const { return problem.shapes[2 * level + 1]; }
    const float* map(int64_t image, int64_t head, int64_t level) const {
        return problem.value + (image * problem.cells + starts[level]) * stride() + head * depth();
    }

    // One head of one query; `pair` counts queries of all images, and heads within a query.
    void sum(int64_t pair, float* output) const {
        Lanes sums[MOST_LANES];
        for (int lane = 0; lane < lanes(); ++lane) sums[lane] = Lanes{};
        Corners corners;
        const int64_t image = pair / (problem.queries * problem.heads), head = pair % problem.heads;
        for (int64_t level = 0; level < problem.levels; ++level) {
            for (int64_t point = 0; point < problem.points; point += GROUP) {
                const int points = std::min<int64_t>(GROUP, problem.points - point);
                const int64_t first = (pair * problem.levels + level) * problem.points + point;
                find_corners(problem.locations + 2 * first, points, height(level), width(level),
                             map(image, head, level), stride(), depth(), corners);
                for (int p = 0; p < points; ++p) {
                    const float weight = problem.weights[first + p];
                    const float* const* cell = corners.cell[p];
                    float share[4];
                    for (int k = 0; k < 4; ++k) share[k] = weight * corners.share[p][k];
                    for (int lane = 0; lane < lanes(); ++lane)
                        sums[lane] += share[0] * load(cell[0], lane, depth()) +
                                      share[1] * load(cell[1], lane, depth()) +
                                      share[2] * load(cell[2], lane, depth()) +
                                      share[3] * load(cell[3], lane, depth());
                }
            }
        }
        for (int lane = 0; lane < lanes(); ++lane)
            store(output + pair * depth(), lane, depth(), sums[lane]);
    }

    void forward(float* output) const {
        const int64_t pairs = problem.images * problem.queries * problem.heads;
        const int64_t block = QUERIES * problem.heads;
        share_out((pairs + block - 1) / block, problem.threads, [&](int64_t item) {
            const int64_t end = std::min(pairs, (item + 1) * block);
            for (int64_t pair = item * block; pair < end; ++pair) sum(pair, output);
        });
    }

    // One level of one head of one query.
    void gradients(int64_t pair, int64_t level, const float* gradient, float* grad_value,
                   float* grad_locations, float* grad_weights, float* nowhere) const {
        Lanes grad[MOST_LANES];
        for (int lane = 0; lane < lanes(); ++lane)
            grad[lane] = load(gradient + pair * depth(), lane, depth());
        Corners corners;
        const int64_t image = pair / (problem.queries * problem.heads), head = pair % problem.heads;
        for (int64_t point = 0; point < problem.points; point += GROUP) {
            const int points = std::min<int64_t>(GROUP, problem.points - point);
            const int64_t first = (pair * problem.levels + level) * problem.points + point;
            find_corners(problem.locations + 2 * first, points, height(level), width(level),
                         map(image, head, level), stride(), depth(), corners);
            for (int p = 0; p < points; ++p) {
                const float weight = problem.weights[first + p];
                const float* share = corners.share[p];
                float dot[4] = {};
                for (int k = 0; k < 4; ++k) {
                    const float* cell = corners.cell[p][k];
                    if (grad_locations || grad_weights) {
                        Lanes product = grad[0] * load(cell, 0, depth());
                        for (int lane = 1; lane < lanes(); ++lane)
                            product += grad[lane] * load(cell, lane, depth());
                        dot[k] = total(product);
                    }
                    if (grad_value) {
                        float* to = cell == zeros ? nowhere : grad_value + (cell - problem.value);
                        const float part = weight * share[k];
                        for (int lane = 0; lane < lanes(); ++lane)
                            store(to, lane, depth(), load(to, lane, depth()) + part * grad[lane]);
                    }
                }
                if (grad_weights)
                    grad_weights[first + p] = dot[0] * share[0] + dot[1] * share[1] +
                                              dot[2] * share[2] + dot[3] * share[3];
                if (grad_locations) {
                    const float right = corners.right[p], above = corners.above[p];
                    float* to = grad_locations + 2 * (first + p);
                    to[0] = weight * width(level) *
                            ((dot[1] - dot[0]) * (1 - above) + (dot[3] - dot[2]) * above);
                    to[1] = weight * height(level) *
                            ((dot[2] - dot[0]) * (1 - right) + (dot[3] - dot[1]) * right);
                }
            }
        }
    }

    // An item is one level of some heads of an image: what it writes, no other item writes. Heads
    // stay together as far as there are items enough, for they lie side by side in memory.
    void backward(const float* gradient, float* grad_value, float* grad_locations,
                  float* grad_weights) const {
        const int64_t levels = problem.levels, heads = problem.heads, queries = problem.queries;
        const int64_t wanted = problem.threads > 1 ? 2 * problem.threads : 1;
        const int64_t whole = problem.images * levels;
        if (whole == 0) return;
        const int64_t groups = std::min(heads, (wanted + whole - 1) / whole);
        share_out(whole * groups, problem.threads, [&](int64_t item) {
            std::vector<float> nowhere(depth());
            const int64_t group = item % groups, level = item / groups % levels;
            const int64_t image = item / groups / levels;
            const int64_t first = group * heads / groups, end = (group + 1) * heads / groups;
            for (int64_t query = image * queries; query < (image + 1) * queries; ++query)
                for (int64_t head = first; head < end; ++head)
                    gradients(query * heads + head, level, gradient, grad_value, grad_locations,
                              grad_weights, nowhere.data());
        });
    }
};

template <class Work>
void at_depth(const Problem& problem, Work work) {
    switch (problem.depth) {
        case 16: return work(Pass<16>(problem));
        case 32: return work(Pass<32>(problem));
        case 64: return work(Pass<64>(problem));
        default: return work(Pass<0>(problem));
    }
}

}  // namespace

extern "C" {

void longtail_sample_forward(const Problem* problem, float* output) {
    at_depth(*problem, [&](const auto& pass) { pass.forward(output); });
}

// `grad_value` holds zeros; a gradient that is null is left out.
void longtail_sample_backward(const Problem* problem, const float* gradient, float* grad_value,
                              float* grad_locations, float* grad_weights) {
    at_depth(*problem, [&](const auto& pass) {
        pass.backward(gradient, grad_value, grad_locations, grad_weights);
    });
}

}
