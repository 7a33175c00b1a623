// Training of small networks, one task after the other, so that a task's numbers stay in the cache of one core, and their
// outputs with first and second derivatives.
//
// A network is a list of layers: a convolution (a linear layer is one with a single pixel), then, if the layer has them,
// normalisation, ReLU and max-pooling. Arrays have channels last: inputs [examples, height, width, channels] with a border
// of zeros where the convolution pads, weights [kernel row, kernel column, input channel, output channel] with the output
// channels padded with zeros to whole vectors. Both products of a layer are therefore sums of vectors of output channels:
//
//   z[pixel] = b + sum over k of in[pixel + offset of k] * w[k]         forward; backward the same with w transposed
//   dw[k]    = sum over pixels of in[pixel + offset of k] * dz[pixel]
//
// Six rows of two vectors are as many sums as fit the registers of a core.
//
// The build defines REAL (float or double), BITS (the integer type of the same size) and, for double, DOUBLE. `network.py` and
// `train.py` hold the ctypes forms of Layer, Steps and Batches. After a change, SHA256 in `source.py` must be renewed.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__) || defined(__aarch64__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define INLINE static inline __attribute__((always_inline))
#define ALONE static __attribute__((noinline))  // loops in a function of their own have all registers

typedef REAL Vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef BITS Whole __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
enum { LANES = BYTES / sizeof(REAL), ROWS = 6, COLUMNS = 2, MOST_LAYERS = 16 };
#ifdef DOUBLE
static const double LARGEST = DBL_MAX;
#else
static const double LARGEST = FLT_MAX;
#endif

INLINE Vector get(const REAL *from) { return *(const Vector *)from; }
INLINE void put(REAL *to, Vector value) { *(Vector *)to = value; }
INLINE Vector zeros() { return Vector{}; }
INLINE Vector larger(Vector a, Vector b) { return (a < b) | (b != b) ? b : a; }  // NaN if either is NaN

struct Layer {
    int32_t side, stride, pad;                       // of the square kernel
    int32_t height, width, inputs;                   // of the input without its border; `inputs`: channels in memory
    int32_t outputs, padded, out_height, out_width;  // of the convolution; `padded`: `outputs` rounded up to whole vectors
    int32_t norm, group;                             // 0 none, 1 over a batch, 2 over `group` channels of an example
    int32_t relu, pool, next_height, next_width;     // the size after pooling
    REAL epsilon;
    long weights() const { return (long)side * side * inputs; }
    long numbers() const { return (weights() + 1 + (norm ? 2 : 0)) * padded; }
    bool plain() const { return !norm && !pool; }
};

// True if a last layer does more than its product: a network of nothing but a body ends so.
static bool finished(const Layer &l) { return l.norm || l.relu || l.pool; }

// How the arrays of a layer move if the parameters do ("tangents"): each is the derivative of its namesake in `Place` along a
// direction. `y`: after normalisation, before pooling. `scale`: of log scale, not of scale. Empty in a first-order pass.
struct Tangents {
    REAL *in, *d_in, *z, *dz, *y, *scale, *sums;
};

// A layer and its arrays for a fixed number of examples.
struct Place {
    Layer layer;
    int examples, pixels, weights;
    long image;                 // numbers of an input image with its border
    long *pixel, *weight;       // offset of a pixel's first input; offset of a weight's input from it
    long *dense, *next, *line;  // offset of a pixel in z; of a pooled pixel in the next layer's input; 0, 1, ..
    REAL *in, *own_in, *d_in, *z, *dz, *active, *scale, *sums, *turned;
    Tangents t;
};

static void *room(size_t bytes) {
    void *found = 0;
    return posix_memalign(&found, 64, bytes + 128) ? 0 : memset(found, 0, bytes + 128);
}

// ---- products

// How the results of a product are stored: added to the old value, or cut off at zero, or kept only where `mask` is positive.
struct Ending {
    bool add, relu;
    const REAL *mask;
};

template <int R, int V>
INLINE void forward_block(int count, const long *offset, const REAL *const *a, const REAL *b, long stride, const REAL *start,
                          REAL *out, const long *to, Ending ending) {
    Vector sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sum[r][v] = ending.add ? get(out + to[r] + v * LANES) : start ? get(start + v * LANES) : zeros();
    for (int k = 0; k < count; k++) {
        long o = offset[k];
        Vector right[V];
        for (int v = 0; v < V; v++) right[v] = get(b + k * stride + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] += a[r][o] * right[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            Vector value = sum[r][v];
            if (ending.relu) value = value < 0 ? zeros() : value;  // not value > 0 ? ..: NaN must stay NaN
            if (ending.mask) value = get(ending.mask + to[r] + v * LANES) > 0 ? value : zeros();
            put(out + to[r] + v * LANES, value);
        }
}

// `NEXT`: the rows are adjacent in memory, as the channels of one pixel are, so that one pointer serves all.
template <int R, int V, bool NEXT>
INLINE void weights_block(int pixels, const long *pixel, const REAL *const *a, const REAL *d, long stride, const REAL *from,
                          REAL step, REAL *to) {
    Vector sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = zeros();
    const REAL *first = a[0];
    for (int p = 0; p < pixels; p++) {
        long o = pixel[p];
        Vector right[V];
        for (int v = 0; v < V; v++) right[v] = get(d + p * stride + v * LANES);
        for (int r = 0; r < R; r++) {
            REAL left = NEXT ? first[o + r] : a[r][o];
            for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            long at = r * stride + v * LANES;
            put(to + at, from ? get(from + at) + step * sum[r][v] : sum[r][v]);
        }
}

// Calls CALL with the numbers of rows and vectors as constants.
// clang-format off
#define FOR_SIZE(v, r, CALL)                                                                            \
    switch ((v) * 8 + (r)) {                                                                            \
    case 9: CALL(1, 1); break; case 10: CALL(2, 1); break; case 11: CALL(3, 1); break;                  \
    case 12: CALL(4, 1); break; case 13: CALL(5, 1); break; case 14: CALL(6, 1); break;                 \
    case 17: CALL(1, 2); break; case 18: CALL(2, 2); break; case 19: CALL(3, 2); break;                 \
    case 20: CALL(4, 2); break; case 21: CALL(5, 2); break; case 22: CALL(6, 2); break;                 \
    }
// clang-format on

// out[to[p]] = start + sum over k of in[pixel[p] + offset[k]] * b[k], for vectors of `stride` columns.
ALONE void forward_product(int pixels, const REAL *in, const long *pixel, int count, const long *offset, const REAL *b,
                           int stride, const REAL *start, REAL *out, const long *to, Ending ending) {
    int blocks = (pixels + ROWS - 1) / ROWS;
    for (int c = 0; c < stride; c += COLUMNS * LANES) {
        int vectors = stride - c > LANES ? 2 : 1;
        Ending here = {ending.add, ending.relu, ending.mask ? ending.mask + c : 0};
        for (int i = 0, p = 0, rows; i < blocks; i++, p += rows) {
            rows = (pixels - p + blocks - i - 1) / (blocks - i);  // blocks of nearly the same size
            const REAL *a[ROWS];
            for (int r = 0; r < rows; r++) a[r] = in + pixel[p + r];
#define CALL(R, V) forward_block<R, V>(count, offset, a, b + c, stride, start ? start + c : 0, out + c, to + p, here)
            FOR_SIZE(vectors, rows, CALL)
#undef CALL
        }
    }
}

// to[k] = from[k] + step * sum over p of in[pixel[p] + offset[k]] * d[p], or without `from` the sum alone.
ALONE void weights_product(int count, const REAL *in, const long *offset, int pixels, const long *pixel, const REAL *d,
                           int stride, const REAL *from, REAL step, REAL *to) {
    int blocks = (count + ROWS - 1) / ROWS;
    for (int c = 0; c < stride; c += COLUMNS * LANES) {
        int vectors = stride - c > LANES ? 2 : 1;
        for (int i = 0, k = 0, rows; i < blocks; i++, k += rows) {
            rows = (count - k + blocks - i - 1) / (blocks - i);
            const REAL *a[ROWS];
            for (int r = 0; r < rows; r++) a[r] = in + offset[k + r];
            const REAL *old = from ? from + (long)k * stride + c : 0;
            REAL *changed = to + (long)k * stride + c;
#define CALL(R, V) weights_block<R, V, true>(pixels, pixel, a, d + c, stride, old, step, changed)
            if (a[rows - 1] == a[0] + rows - 1) {
                FOR_SIZE(vectors, rows, CALL)
            }
#undef CALL
#define CALL(R, V) weights_block<R, V, false>(pixels, pixel, a, d + c, stride, old, step, changed)
            else {
                FOR_SIZE(vectors, rows, CALL)
            }
#undef CALL
        }
    }
}

#ifdef __clang__  // its shuffles take the order of the lanes as constants
template <int... lane> struct Order {};
template <int count, int... lane> struct First : First<count - 1, count - 1, lane...> {};
template <int... lane> struct First<0, lane...> { typedef Order<lane...> Lanes; };

template <int half, int... m> INLINE void swap_two(Vector &a, Vector &b, Order<m...>) {
    Vector low = __builtin_shufflevector(a, b, ((m & half ? m - half + LANES : m) % (2 * LANES))...);
    b = __builtin_shufflevector(a, b, ((m & half ? m + LANES : m + half) % (2 * LANES))...);
    a = low;
}
template <int half> INLINE void swap_two(Vector &a, Vector &b) { swap_two<half>(a, b, First<LANES>::Lanes()); }
#else
template <int half> INLINE void swap_two(Vector &a, Vector &b) {
    Whole low, high;
    for (int m = 0; m < LANES; m++) {
        low[m] = m & half ? m - half + LANES : m;
        high[m] = m & half ? m + LANES : m + half;
    }
    Vector old = a;
    a = __builtin_shuffle(old, b, low);
    b = __builtin_shuffle(old, b, high);
}
#endif

template <int half> INLINE void swap_halves(Vector *x) {
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++)
        if (!(k & half)) swap_two<half>(x[k], x[k + half]);
}

INLINE void transpose_square(const REAL *in, int in_stride, REAL *out, int out_stride, int columns) {
    Vector x[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) x[k] = get(in + (long)k * in_stride);
    swap_halves<1>(x);
    if (LANES > 2) swap_halves<2>(x);
    if (LANES > 4) swap_halves<4>(x);
    if (LANES > 8) swap_halves<8>(x);
    for (int k = 0; k < columns; k++) put(out + (long)k * out_stride, x[k]);
}

// out[j][i] = in[i][j] for i < rows, j < columns; `rows` and both strides are whole vectors.
static void transpose(int rows, int columns, const REAL *in, int in_stride, REAL *out, int out_stride) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES)
            transpose_square(in + (long)i * in_stride + j, in_stride, out + (long)j * out_stride + i, out_stride,
                             columns - j < LANES ? columns - j : LANES);
}

// ---- the operations after a convolution

// Sums over the channels of every group, in place.
static void over_groups(REAL *sums, int channels, int group) {
    for (int g = 0; group > 1 && g < channels; g += group) {
        REAL sum = 0;
        for (int c = 0; c < group; c++) sum += sums[g + c];
        for (int c = 0; c < group; c++) sums[g + c] = sum;
    }
}

// z <- (z - mean) / deviation, in place; 1 / deviation goes to `scale`. A segment is a batch or an example.
//
// The sum of numbers that are large compared with their deviation loses the significant digits. The differences from a first
// mean are therefore summed too, with their squares: the corrected two-pass algorithm (Chan, Golub, LeVeque 1983, "Algorithms
// for Computing the Sample Variance").
static void normalise(const Place &p) {
    int C = p.layer.padded, segments = p.layer.norm == 2 ? p.examples : 1, length = p.pixels / segments;
    REAL count = (REAL)length * p.layer.group, *mean = p.sums, *rest = p.sums + C;
    for (int s = 0; s < segments; s++) {
        REAL *z = p.z + (long)s * length * C, *scale = p.scale + (long)s * C;
        for (int c = 0; c < C; c += LANES) {
            Vector sum = zeros();
            for (int i = 0; i < length; i++) sum += get(z + (long)i * C + c);
            put(mean + c, sum);
        }
        over_groups(mean, p.layer.outputs, p.layer.group);
        for (int c = 0; c < C; c += LANES) {
            Vector sum = zeros(), squares = zeros(), middle = get(mean + c) / count;
            for (int i = 0; i < length; i++) {
                Vector x = get(z + (long)i * C + c) - middle;
                put(z + (long)i * C + c, x);
                sum += x;
                squares += x * x;
            }
            put(rest + c, sum);
            put(scale + c, squares);
        }
        over_groups(rest, p.layer.outputs, p.layer.group);
        over_groups(scale, p.layer.outputs, p.layer.group);
        for (int c = 0; c < C; c++) {
            REAL middle = rest[c] / count, variance = scale[c] / count - middle * middle;
            rest[c] = middle;
            scale[c] = 1 / (REAL)sqrt((variance < 0 ? 0 : variance) + p.layer.epsilon);  // NaN stays NaN
        }
        for (int i = 0; i < length; i++)
            for (int c = 0; c < C; c += LANES) {
                REAL *x = z + (long)i * C + c;
                put(x, (get(x) - get(rest + c)) * get(scale + c));
            }
    }
}

// Gradients with respect to gamma and beta (into `sums`) and, in place, to the input of the normalisation.
static void normalise_backward(const Place &p, const REAL *gamma) {
    int C = p.layer.padded, segments = p.layer.norm == 2 ? p.examples : 1, length = p.pixels / segments;
    REAL count = (REAL)length * p.layer.group, *of_gamma = p.sums, *first = p.sums + 2 * C, *second = first + C;
    memset(of_gamma, 0, 2 * C * sizeof(REAL));
    for (int s = 0; s < segments; s++) {
        REAL *z = p.z + (long)s * length * C, *dz = p.dz + (long)s * length * C, *scale = p.scale + (long)s * C;
        for (int c = 0; c < C; c += LANES) {
            Vector sum = zeros(), product = zeros();
            for (int i = 0; i < length; i++) {
                Vector d = get(dz + (long)i * C + c);
                sum += d;
                product += d * get(z + (long)i * C + c);
            }
            put(of_gamma + c, get(of_gamma + c) + product);
            put(of_gamma + C + c, get(of_gamma + C + c) + sum);
            put(first + c, sum * get(gamma + c));
            put(second + c, product * get(gamma + c));
        }
        over_groups(first, p.layer.outputs, p.layer.group);
        over_groups(second, p.layer.outputs, p.layer.group);
        for (int c = 0; c < C; c += LANES) {
            Vector one = get(first + c) / count, two = get(second + c) / count;
            for (int i = 0; i < length; i++) {
                REAL *d = dz + (long)i * C + c;
                put(d, get(scale + c) * (get(d) * get(gamma + c) - one - get(z + (long)i * C + c) * two));
            }
        }
    }
}

// Offsets of the pixels in a max-pooling window; the neighbour replaces a pixel beyond the edge.
struct Window {
    long first, right, down;
    Window(const Place &p, int example, int i, int j) {
        const Layer &l = p.layer;
        first = ((long)example * l.out_height * l.out_width + 2L * i * l.out_width + 2L * j) * l.padded;
        right = 2 * j + 1 < l.out_width ? l.padded : 0;
        down = 2 * i + 1 < l.out_height ? (long)l.out_width * l.padded : 0;
    }
};

// From z to the next layer's input: gamma, beta, ReLU, pooling.
static void finish_forward(const Place &p, const REAL *gamma, REAL *next_in) {
    const Layer &l = p.layer;
    int C = l.padded;
    if (l.norm) normalise(p);
    REAL *to = l.pool ? p.active : next_in;
    const long *place = l.pool ? p.dense : p.next;
    for (int i = 0; i < p.pixels; i++)
        for (int c = 0; c < C; c += LANES) {
            Vector y = get(p.z + (long)i * C + c);
            if (l.norm) y = y * get(gamma + c) + get(gamma + C + c);
            if (l.relu) y = y < 0 ? zeros() : y;
            put(to + place[i] + c, y);
        }
    if (!l.pool) return;
    const long *q = p.next;
    for (int e = 0; e < p.examples; e++)
        for (int i = 0; i < l.next_height; i++)
            for (int j = 0; j < l.next_width; j++, q++) {
                Window w(p, e, i, j);
                const REAL *a = p.active + w.first;
                for (int c = 0; c < C; c += LANES) {
                    Vector one = get(a + c), two = get(a + w.right + c);
                    Vector three = get(a + w.down + c), four = get(a + w.down + w.right + c);
                    put(next_in + *q + c, larger(larger(one, two), larger(three, four)));
                }
            }
}

// Backward through pooling: the first of a window's largest pixels gets the gradient. After ReLU, a zero gets none.
static void unpool(const Place &p, const REAL *next_in, const REAL *next_d, REAL *to) {
    const Layer &l = p.layer;
    int C = l.padded;
    const long *q = p.next;
    memset(to, 0, (size_t)p.pixels * C * sizeof(REAL));
    for (int e = 0; e < p.examples; e++)
        for (int i = 0; i < l.next_height; i++)
            for (int j = 0; j < l.next_width; j++, q++) {
                Window w(p, e, i, j);
                long offsets[4] = {0, w.right, w.down, w.down + w.right};
                for (int c = 0; c < C; c += LANES) {
                    Vector most = get(next_in + *q + c), left = most > 0 ? get(next_d + *q + c) : zeros();
                    for (int k = 0; k < 4; k++) {
                        REAL *d = to + w.first + offsets[k] + c;
                        Whole chosen = get(p.active + w.first + offsets[k] + c) == most;
                        put(d, chosen ? get(d) + left : get(d));
                        left = chosen ? zeros() : left;
                    }
                }
            }
}

// Backward through pooling and ReLU: from the gradient with respect to the next layer's input to one like `dz`.
static void before_pooling(const Place &p, const REAL *next_in, const REAL *next_d, REAL *to) {
    const Layer &l = p.layer;
    if (l.pool) {
        unpool(p, next_in, next_d, to);
        return;
    }
    for (int i = 0; i < p.pixels; i++)
        for (int c = 0; c < l.padded; c += LANES) {
            Vector d = get(next_d + p.next[i] + c);
            if (l.relu) d = get(next_in + p.next[i] + c) > 0 ? d : zeros();
            put(to + p.dense[i] + c, d);
        }
}

// From the gradient with respect to the next layer's input to `dz`.
static void finish_backward(const Place &p, const REAL *gamma, const REAL *next_in, const REAL *next_d) {
    before_pooling(p, next_in, next_d, p.dz);
    if (p.layer.norm) normalise_backward(p, gamma);
}

// ---- the loss

INLINE Vector exponential(Vector x) {
#ifdef DOUBLE
    for (int i = 0; i < LANES; i++) x[i] = exp(x[i]);
    return x;
#else
    // 2^n * e^r with |r| <= ln(2) / 2, and e^r by its series. x is at most 0. NaN stays NaN.
    x = x < -87.0f ? zeros() - 87.0f : x;
    Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Vector)((__builtin_convertvector(n, Whole) + 127) << 23);
#endif
}

// Softmax and cross-entropy; the gradient times `share` goes to `dz`. Returns the loss if `wanted`.
static REAL classify(const Place &p, const int64_t *labels, const int64_t *rows, const REAL *share, bool wanted) {
    int C = p.layer.padded, outputs = p.layer.outputs;
    REAL loss = 0;
    for (int e = 0; e < p.examples; e++) {
        REAL *z = p.z + (long)e * C, *dz = p.dz + (long)e * C, top = z[0], total = 0;
        int64_t label = labels[rows ? rows[e] : e];
        if (label < 0 || label >= outputs) return (REAL)NAN;
        for (int c = 1; c < outputs; c++) top = z[c] > top ? z[c] : top;
        for (int c = outputs; c < C; c++) z[c] = -(REAL)INFINITY;
        for (int c = 0; c < C; c += LANES) {
            Vector x = exponential(get(z + c) - top);
            put(dz + c, x);
        }
        for (int c = outputs; c < C; c++) dz[c] = 0;
        for (int c = 0; c < outputs; c++) total += dz[c];
        for (int c = 0; c < C; c += LANES) put(dz + c, get(dz + c) * (share[e] / total));
        dz[label] -= share[e];
        if (wanted && !(share[e] <= 0)) loss += share[e] * ((REAL)log(total) + (top - z[label]));
    }
    return loss;
}

// Squared error, averaged over the outputs; the gradient times `share` goes to `dz`. Returns the loss.
static REAL regress(const Place &p, const REAL *targets, const int64_t *rows, const REAL *share) {
    int C = p.layer.padded, outputs = p.layer.outputs;
    REAL loss = 0;
    for (int e = 0; e < p.examples; e++) {
        REAL *z = p.z + (long)e * C, *dz = p.dz + (long)e * C, squares = 0;
        for (int c = 0; c < outputs; c++) {
            REAL error = z[c] - targets[(rows ? (long)rows[e] : e) * outputs + c];
            squares += error * error;
            dz[c] = share[e] * 2 * error / outputs;
        }
        if (!(share[e] <= 0)) loss += share[e] * squares / outputs;
    }
    return loss;
}

// ---- one step of one task

// Sets the first layer's input: all examples, or those that `rows` lists. Images [channels, height, width] are copied.
static void read(Place &p, const REAL *x, const int64_t *rows) {
    const Layer &l = p.layer;
    long size = (long)l.inputs * l.height * l.width;
    if (!p.own_in) p.in = (REAL *)x;
    for (int e = 0; e < p.examples; e++) {
        long row = rows ? (long)rows[e] : e;
        if (!p.own_in) p.pixel[e] = row * size;
        const REAL *from = x + row * size;
        for (int c = 0; p.own_in && c < l.inputs; c++)
            for (int i = 0; i < l.height; i++)
                for (int j = 0; j < l.width; j++, from++)
                    p.in[e * p.image + ((long)(i + l.pad) * (l.width + 2 * l.pad) + j + l.pad) * l.inputs + c] = *from;
    }
}

// `out`: where what follows the last product goes, see `finished`; not written if nothing follows it.
static void forward(Place *places, int layers, const REAL *theta, REAL *out) {
    for (int n = 0; n < layers; n++) {
        Place &p = places[n], *next = n + 1 < layers ? &places[n + 1] : 0;
        const REAL *bias = theta + p.weights * (long)p.layer.padded, *gamma = bias + p.layer.padded;
        bool direct = next && p.layer.plain();  // nothing but ReLU before the next layer: no need for z
        Ending ending = {false, direct && p.layer.relu, 0};
        forward_product(p.pixels, p.in, p.pixel, p.weights, p.weight, theta, p.layer.padded, bias, direct ? next->in : p.z,
                        direct ? p.next : p.dense, ending);
        if (!direct && (next || finished(p.layer))) finish_forward(p, gamma, next ? next->in : out);
        theta += p.layer.numbers();
    }
}

// True if the gradient with respect to the input of `p`, apart from ReLU, is `dz` of the layer below in the same layout.
static bool is_direct(const Place &p, const Place &below) { return p.layer.side == 1 && !p.layer.pad && below.layer.plain(); }

// The gradient `d` of `p`, through its weights `w`, goes to `to`: the `dz` of the layer below if that `is_direct`, without what
// its ReLU holds back, else an array like `in`. With `more` it is added.
static void hand_down(Place &p, const Place &below, const REAL *w, const REAL *d, REAL *to, bool more) {
    const Layer &l = p.layer;
    int taps = l.side * l.side;
    long turned = (long)l.outputs * l.inputs;
    Ending ending = {more || taps > 1, false, is_direct(p, below) && below.layer.relu ? p.in : 0};
    if (taps > 1 && !more) memset(to, 0, (size_t)p.examples * p.image * sizeof(REAL));
    for (int t = 0; t < taps; t++) {
        transpose(l.inputs, l.outputs, w + (long)t * l.inputs * l.padded, l.padded, p.turned + t * turned, l.inputs);
        forward_product(p.pixels, d, p.dense, l.outputs, p.line, p.turned + t * turned, l.inputs, 0,
                        to + p.weight[(long)t * l.inputs], p.pixel, ending);
    }
}

// to = from + step * sum; without `from` the sum.
INLINE void change(const REAL *from, REAL step, Vector sum, REAL *to) { put(to, from ? get(from) + step * sum : sum); }

static void change_bias(const Place &p, const REAL *d, const REAL *from, REAL step, REAL *to) {
    int C = p.layer.padded;
    for (int c = 0; c < C; c += 4 * LANES) {
        int vectors = (C - c) / LANES < 4 ? (C - c) / LANES : 4;
        Vector sum[4] = {zeros(), zeros(), zeros(), zeros()};
        if (vectors == 4)
            for (int i = 0; i < p.pixels; i++)
                for (int v = 0; v < 4; v++) sum[v] += get(d + (long)i * C + c + v * LANES);
        else
            for (int v = 0; v < vectors; v++)
                for (int i = 0; i < p.pixels; i++) sum[v] += get(d + (long)i * C + c + v * LANES);
        for (int v = 0; v < vectors; v++) change(from ? from + c + v * LANES : 0, step, sum[v], to + c + v * LANES);
    }
}

// From `dz` of the last layer: to = theta + step * gradient, also in place; without `keep` the gradient alone.
static void backward(Place *places, int layers, const REAL *theta, bool keep, REAL step, REAL *to) {
    for (int n = 0; n < layers; n++) theta += places[n].layer.numbers(), to += places[n].layer.numbers();
    for (int n = layers - 1; n >= 0; n--) {
        Place &p = places[n];
        long C = p.layer.padded, bias = p.weights * C, gamma = bias + C;
        theta -= p.layer.numbers(), to -= p.layer.numbers();
        Place *next = n + 1 < layers ? &places[n + 1] : 0;
        if (next && !is_direct(*next, p)) finish_backward(p, theta + gamma, next->in, next->d_in);
        if (p.layer.norm)
            for (long c = 0; c < 2 * C; c += LANES) change(keep ? theta + gamma + c : 0, step, get(p.sums + c), to + gamma + c);
        if (n) hand_down(p, places[n - 1], theta, p.dz, is_direct(p, places[n - 1]) ? places[n - 1].dz : p.d_in, false);
        weights_product(p.weights, p.in, p.weight, p.pixels, p.pixel, p.dz, C, keep ? theta : 0, step, to);
        change_bias(p, p.dz, keep ? theta + bias : 0, step, to + bias);
    }
}

// ---- second derivatives: the passes above, differentiated along a direction `v` of the parameters (Pearlmutter 1994, "Fast
// Exact Multiplication by the Hessian"). ReLU and pooling choose as in the pass itself.

// After `finish_forward`: from the tangent of z to that of the next layer's input. Normalised by n = (z - mean) s:
// n' = s (z' - mean(z') - n mean(n z')), s' = -s s mean(n z').
static void finish_tangent(const Place &p, const REAL *gamma, const REAL *v_gamma, const REAL *next_in, REAL *next_t) {
    const Layer &l = p.layer;
    const Tangents &t = p.t;
    int C = l.padded, segments = l.norm == 2 ? p.examples : 1, length = p.pixels / segments;
    REAL count = (REAL)length * l.group, *first = t.sums, *second = t.sums + C;
    for (int s = 0; l.norm && s < segments; s++) {
        long at = (long)s * length * C;
        REAL *scale = p.scale + (long)s * C, *t_scale = t.scale + (long)s * C;
        for (int c = 0; c < C; c += LANES) {
            Vector sum = zeros(), product = zeros();
            for (int i = 0; i < length; i++) {
                Vector z = get(t.z + at + (long)i * C + c);
                sum += z;
                product += z * get(p.z + at + (long)i * C + c);
            }
            put(first + c, sum);
            put(second + c, product);
        }
        over_groups(first, l.outputs, l.group);
        over_groups(second, l.outputs, l.group);
        for (int c = 0; c < C; c += LANES) {
            Vector one = get(first + c) / count, two = get(second + c) / count;
            put(t_scale + c, zeros() - get(scale + c) * two);
            for (int i = 0; i < length; i++) {
                long k = at + (long)i * C + c;
                put(t.z + k, get(scale + c) * (get(t.z + k) - one - get(p.z + k) * two));
            }
        }
    }
    const REAL *shown = l.pool ? p.active : next_in;
    const long *place = l.pool ? p.dense : p.next;
    REAL *to = l.pool ? t.y : next_t;
    for (int i = 0; i < p.pixels; i++)
        for (int c = 0; c < C; c += LANES) {
            Vector y = get(t.z + (long)i * C + c);
            if (l.norm) y = y * get(gamma + c) + get(p.z + (long)i * C + c) * get(v_gamma + c) + get(v_gamma + C + c);
            if (l.relu) y = get(shown + place[i] + c) > 0 ? y : zeros();
            put(to + place[i] + c, y);
        }
    if (!l.pool) return;
    const long *q = p.next;
    for (int e = 0; e < p.examples; e++)
        for (int i = 0; i < l.next_height; i++)
            for (int j = 0; j < l.next_width; j++, q++) {
                Window w(p, e, i, j);
                long offsets[4] = {0, w.right, w.down, w.down + w.right};
                for (int c = 0; c < C; c += LANES) {
                    Vector most = get(next_in + *q + c), found = zeros();
                    for (int k = 3; k >= 0; k--) {  // the first of the largest is written last
                        Whole chosen = get(p.active + w.first + offsets[k] + c) == most;
                        found = chosen ? get(t.y + w.first + offsets[k] + c) : found;
                    }
                    put(next_t + *q + c, most > 0 ? found : zeros());
                }
            }
}

// `forward` along `v`, after it. `t_out` beside `out`.
static void forward_tangent(Place *places, int layers, const REAL *theta, const REAL *v, const REAL *out, REAL *t_out) {
    for (int n = 0; n < layers; n++) {
        Place &p = places[n], *next = n + 1 < layers ? &places[n + 1] : 0;
        long C = p.layer.padded, bias = p.weights * C, gamma = bias + C;
        bool direct = next && p.layer.plain();
        REAL *to = direct ? next->t.in : p.t.z;
        const long *place = direct ? p.next : p.dense;
        Ending ending = {false, false, direct && p.layer.relu ? next->in : 0};
        forward_product(p.pixels, p.in, p.pixel, p.weights, p.weight, v, C, v + bias, to, place, ending);
        ending.add = true;
        if (n) forward_product(p.pixels, p.t.in, p.pixel, p.weights, p.weight, theta, C, 0, to, place, ending);
        if (!direct && (next || finished(p.layer)))
            finish_tangent(p, theta + gamma, v + gamma, next ? next->in : out, next ? next->t.in : t_out);
        theta += p.layer.numbers(), v += p.layer.numbers();
    }
}

// `normalise_backward` along `v`, and that itself: with d the gradient with respect to gamma n + beta, from which it makes
// dz = s (e - mean(e) - n mean(n e)) with e = gamma d. The tangents of the gradients of gamma and beta go to `t.sums`.
static void normalise_tangent(const Place &p, const REAL *gamma, const REAL *v_gamma) {
    const Tangents &t = p.t;
    int C = p.layer.padded, segments = p.layer.norm == 2 ? p.examples : 1, length = p.pixels / segments;
    REAL count = (REAL)length * p.layer.group, *of_gamma = t.sums, *sums = t.sums + 2 * C;
    memset(of_gamma, 0, 2 * C * sizeof(REAL));
    for (int s = 0; s < segments; s++) {
        long at = (long)s * length * C;
        REAL *scale = p.scale + (long)s * C;
        for (int c = 0; c < C; c += LANES) {
            Vector g = get(gamma + c), v = get(v_gamma + c);
            Vector sum = zeros(), product = zeros(), old = zeros(), one = zeros(), two = zeros();
            for (int i = 0; i < length; i++) {
                long k = at + (long)i * C + c;
                Vector d = get(p.dz + k), td = get(t.dz + k), n = get(p.z + k), tn = get(t.z + k);
                Vector te = v * d + g * td;
                one += td * n + d * tn;
                two += td;
                sum += te;
                product += tn * g * d + n * te;
                old += n * g * d;
            }
            put(of_gamma + c, get(of_gamma + c) + one);
            put(of_gamma + C + c, get(of_gamma + C + c) + two);
            put(sums + c, sum);
            put(sums + C + c, product);
            put(sums + 2 * C + c, old);
        }
        for (int k = 0; k < 3; k++) over_groups(sums + k * C, p.layer.outputs, p.layer.group);
        for (int c = 0; c < C; c += LANES) {
            Vector g = get(gamma + c), v = get(v_gamma + c);
            Vector sum = get(sums + c) / count, product = get(sums + C + c) / count, old = get(sums + 2 * C + c) / count;
            for (int i = 0; i < length; i++) {
                long k = at + (long)i * C + c;
                Vector te = v * get(p.dz + k) + g * get(t.dz + k);
                put(t.dz + k, get(scale + c) * (te - sum - get(t.z + k) * old - get(p.z + k) * product));
            }
        }
    }
    normalise_backward(p, gamma);
    for (int s = 0; s < segments; s++)
        for (int i = 0; i < length; i++)
            for (int c = 0; c < C; c += LANES) {
                long k = ((long)s * length + i) * C + c;
                put(t.dz + k, get(t.dz + k) + get(t.scale + (long)s * C + c) * get(p.dz + k));
            }
}

// `backward` along `v`, together with it, from `dz` and `t.dz` of the last layer: the tangent of the gradient goes to `to`.
static void backward_tangent(Place *places, int layers, const REAL *theta, const REAL *v, REAL *to) {
    for (int n = 0; n < layers; n++)
        theta += places[n].layer.numbers(), v += places[n].layer.numbers(), to += places[n].layer.numbers();
    for (int n = layers - 1; n >= 0; n--) {
        Place &p = places[n];
        long C = p.layer.padded, bias = p.weights * C, gamma = bias + C;
        theta -= p.layer.numbers(), v -= p.layer.numbers(), to -= p.layer.numbers();
        Place *next = n + 1 < layers ? &places[n + 1] : 0;
        if (next && !is_direct(*next, p)) {
            before_pooling(p, next->in, next->d_in, p.dz);
            before_pooling(p, next->in, next->t.d_in, p.t.dz);
            if (p.layer.norm) normalise_tangent(p, theta + gamma, v + gamma);
        }
        if (p.layer.norm)
            for (long c = 0; c < 2 * C; c += LANES) put(to + gamma + c, get(p.t.sums + c));
        if (n) {
            Place &below = places[n - 1];
            bool direct = is_direct(p, below);
            REAL *lower = direct ? below.t.dz : p.t.d_in;
            hand_down(p, below, v, p.dz, lower, false);
            hand_down(p, below, theta, p.t.dz, lower, true);
            hand_down(p, below, theta, p.dz, direct ? below.dz : p.d_in, false);
        }
        weights_product(p.weights, p.in, p.weight, p.pixels, p.pixel, p.t.dz, C, 0, 1, to);
        if (n) weights_product(p.weights, p.t.in, p.weight, p.pixels, p.pixel, p.dz, C, to, 1, to);
        change_bias(p, p.t.dz, 0, 1, to + bias);
    }
}

// From the tangent of the outputs to that of `dz`, which `classify` has left there: share p (z' - <p, z'>). All z' are taken from
// that of the likeliest class: if p is 1 there and 0 elsewhere, rounding would otherwise leave a part of z' where nothing is.
static void classify_tangent(const Place &p, const int64_t *labels, const int64_t *rows, const REAL *share) {
    int C = p.layer.padded;
    for (int e = 0; e < p.examples; e++) {
        const REAL *tz = p.t.z + (long)e * C, *dz = p.dz + (long)e * C;
        REAL *to = p.t.dz + (long)e * C, sum = 0;
        int64_t label = labels[rows ? rows[e] : e];
        if (label < 0 || label >= p.layer.outputs) {
            for (int c = 0; c < C; c++) to[c] = (REAL)NAN;
            continue;
        }
        int top = 0;
        for (int c = 0; c < C; c++) {
            to[c] = dz[c] + (c == label ? share[e] : 0);  // share p
            if (to[c] > to[top]) top = c;
        }
        for (int c = 0; c < C; c++) sum += to[c] * (tz[c] - tz[top]);
        REAL mean = share[e] > 0 ? sum / share[e] : 0;
        for (int c = 0; c < C; c++) to[c] *= tz[c] - tz[top] - mean;
    }
}

static void regress_tangent(const Place &p, const REAL *share) {
    int C = p.layer.padded, outputs = p.layer.outputs;
    memset(p.t.dz, 0, (size_t)p.examples * C * sizeof(REAL));
    for (int e = 0; e < p.examples; e++)
        for (int c = 0; c < outputs; c++) p.t.dz[(long)e * C + c] = share[e] * 2 * p.t.z[(long)e * C + c] / outputs;
}

// ---- many steps of many tasks

struct Rooms {
    void *taken[24 * MOST_LAYERS + 8];
    int count = 0;
    bool full = false;
    template <class T> T *take(size_t numbers) {
        T *found = (T *)room(numbers * sizeof(T));
        full |= !found;
        return (T *)(taken[count++] = found);
    }
    ~Rooms() {
        while (count) free(taken[--count]);
    }
};

// Writes the offsets of the pixels of images [examples, height, width] in an array with a border.
static void offsets(long *to, int examples, int height, int width, int border, int stride, long row, long channels,
                    long image) {
    for (int e = 0; e < examples; e++)
        for (int i = 0; i < height; i++)
            for (int j = 0; j < width; j++)
                *to++ = e * image + ((long)(i * stride + border) * row + j * stride + border) * channels;
}

static Place place(Rooms &rooms, const Layer &l, int examples, bool first, const Layer *next, bool tangents) {
    Place p = {};
    long row = l.width + 2 * l.pad, size = (long)l.out_height * l.out_width, pixels = examples * size;
    p.layer = l;
    p.examples = examples, p.pixels = (int)pixels, p.weights = (int)l.weights();
    p.image = (l.height + 2 * l.pad) * row * l.inputs;
    p.pixel = rooms.take<long>(pixels), p.dense = rooms.take<long>(pixels), p.next = rooms.take<long>(pixels);
    p.weight = rooms.take<long>(p.weights), p.line = rooms.take<long>(l.padded);
    bool as_they_lie = first && l.side == 1 && l.height * l.width == 1 && !l.pad;
    p.own_in = as_they_lie ? 0 : rooms.take<REAL>(examples * p.image);
    p.in = p.own_in;
    p.z = rooms.take<REAL>(pixels * l.padded), p.dz = rooms.take<REAL>(pixels * l.padded);
    p.scale = rooms.take<REAL>((long)examples * l.padded), p.sums = rooms.take<REAL>(4L * l.padded);
    if (l.pool) p.active = rooms.take<REAL>(pixels * l.padded);
    if (!first) p.d_in = rooms.take<REAL>(examples * p.image), p.turned = rooms.take<REAL>((long)p.weights * l.outputs);
    if (tangents) {
        p.t.z = rooms.take<REAL>(pixels * l.padded), p.t.dz = rooms.take<REAL>(pixels * l.padded);
        p.t.scale = rooms.take<REAL>((long)examples * l.padded), p.t.sums = rooms.take<REAL>(5L * l.padded);
        if (l.pool) p.t.y = rooms.take<REAL>(pixels * l.padded);
        if (!first) p.t.in = rooms.take<REAL>(examples * p.image), p.t.d_in = rooms.take<REAL>(examples * p.image);
    }
    if (rooms.full) return p;
    offsets(p.pixel, examples, l.out_height, l.out_width, 0, l.stride, row, l.inputs, p.image);
    offsets(p.dense, examples, l.out_height, l.out_width, 0, 1, l.out_width, l.padded, size * l.padded);
    if (next) {
        int border = next->pad, height = l.next_height, width = l.next_width;
        long image = (long)(height + 2 * border) * (width + 2 * border) * l.padded;
        offsets(p.next, examples, height, width, border, 1, width + 2 * border, l.padded, image);
    }
    for (int k = 0; k < l.padded; k++) p.line[k] = k;
    for (int i = 0, k = 0; i < l.side; i++)
        for (int j = 0; j < l.side; j++)
            for (int c = 0; c < l.inputs; c++) p.weight[k++] = (i * row + j) * l.inputs + c;
    return p;
}

// An array with axes [tasks, steps, ...], and the distances in bytes between tasks and between steps.
struct Steps {
    const char *numbers;
    long task, step;
    const void *at(int t, int s) const { return numbers ? numbers + t * task + s * step : 0; }
};

// Batches of many tasks. A batch is a step's part of `x` and `y`, or with `rows` those rows of them. `share`: weights of its
// examples that add up to 1.
struct Batches {
    int32_t steps, examples;
    Steps x, y, share, rows;
};

// A network and its arrays for batches of one size.
struct Net {
    Rooms rooms;
    Place places[MOST_LAYERS];
    int layers;
    bool classes;
    const Batches &batches;
    long size = 0;

    Net(const Layer *list, int layers, bool classes, const Batches &batches, bool tangents = false)
        : layers(layers), classes(classes), batches(batches) {
        static const Layer nothing = {};  // after the last layer, without a border
        for (int n = 0; n < layers; n++) {
            bool last = n + 1 == layers;
            const Layer *next = !last ? list + n + 1 : finished(list[n]) ? &nothing : 0;
            places[n] = place(rooms, list[n], batches.examples, n == 0, next, tangents);
            size += list[n].numbers();
        }
    }

    const Place &top() const { return places[layers - 1]; }

    // Numbers of all outputs, channels last.
    long outputs() const {
        const Layer &l = top().layer;
        return (finished(l) ? (long)batches.examples * l.next_height * l.next_width : top().pixels) * l.padded;
    }

    // Computes the outputs of a batch in `out`.
    void run(int task, const REAL *theta, REAL *out) {
        read(places[0], (const REAL *)batches.x.at(task, 0), 0);
        forward(places, layers, theta, out);
        if (!finished(top().layer)) memcpy(out, top().z, outputs() * sizeof(REAL));
    }

    // Computes the input of `backward` from the gradient `d` with respect to the outputs `out`.
    void pull(const REAL *theta, const REAL *out, const REAL *d) {
        const Place &p = top();
        for (int n = 0; n + 1 < layers; n++) theta += places[n].layer.numbers();
        if (finished(p.layer))
            finish_backward(p, theta + (p.weights + 1) * (long)p.layer.padded, out, d);
        else
            memcpy(p.dz, d, outputs() * sizeof(REAL));
    }

    // The same along `v`, with both: the gradient `d` does not move.
    void pull_tangent(const REAL *theta, const REAL *v, const REAL *out, const REAL *d, const REAL *zero) {
        const Place &p = top();
        for (int n = 0; n + 1 < layers; n++) theta += places[n].layer.numbers(), v += places[n].layer.numbers();
        long gamma = (p.weights + 1) * (long)p.layer.padded;
        if (!finished(p.layer)) {
            memcpy(p.dz, d, outputs() * sizeof(REAL));
            memset(p.t.dz, 0, outputs() * sizeof(REAL));
            return;
        }
        before_pooling(p, out, d, p.dz);
        before_pooling(p, out, zero, p.t.dz);
        if (p.layer.norm) normalise_tangent(p, theta + gamma, v + gamma);
    }

    // Computes the input of `backward` from a batch. Returns the loss if `wanted`.
    REAL loss(int task, int step, const REAL *theta, bool wanted) {
        const int64_t *rows = (const int64_t *)batches.rows.at(task, step);
        const void *y = batches.y.at(task, step);
        const REAL *share = (const REAL *)batches.share.at(task, step);
        read(places[0], (const REAL *)batches.x.at(task, step), rows);
        forward(places, layers, theta, 0);
        return classes ? classify(top(), (const int64_t *)y, rows, share, wanted)
                       : regress(top(), (const REAL *)y, rows, share);
    }

    // The Hessian of the loss of one of a task's batches times `v`.
    void product(int task, int step, const REAL *theta, const REAL *v, REAL *to) {
        const int64_t *rows = (const int64_t *)batches.rows.at(task, step);
        const REAL *share = (const REAL *)batches.share.at(task, step);
        loss(task, step, theta, false);
        forward_tangent(places, layers, theta, v, 0, 0);
        if (classes)
            classify_tangent(top(), (const int64_t *)batches.y.at(task, step), rows, share);
        else
            regress_tangent(top(), share);
        backward_tangent(places, layers, theta, v, to);
    }

    // Takes a step on every batch of a task, in `theta`, each number at its own rate. `path` [steps, numbers], unless it is 0: where
    // each step began. `slopes`: the gradient of the last step, or with `all` of every step, [steps, numbers].
    void walk(int task, const REAL *rates, REAL *theta, REAL *path, REAL *slopes, bool all) {
        for (int s = 0; s < batches.steps; s++, slopes += all ? size : 0) {
            if (path) memcpy(path + s * size, theta, size * sizeof(REAL));
            REAL loss = this->loss(task, s, theta, false);
            backward(places, layers, theta, false, 1, slopes);
            if (loss != loss) slopes[0] = loss;
            for (long c = 0; c < size; c += LANES) put(theta + c, get(theta + c) - get(rates + c) * get(slopes + c));
        }
    }

    // Backward through a `walk`: v <- v - H_s (a * v), from the last step to the first. In `v` the gradient with respect to the end
    // becomes that with respect to the start; `of_rates` gets that of the rates a, the sum of -g_s * v. `scratch` [2, numbers].
    void back(int task, const REAL *rates, const REAL *path, const REAL *slopes, REAL *v, REAL *of_rates, REAL *scratch) {
        if (of_rates) memset(of_rates, 0, size * sizeof(REAL));
        for (long s = batches.steps - 1; s >= 0; s--) {
            const REAL *g = slopes + s * size;
            for (long c = 0; of_rates && c < size; c += LANES) put(of_rates + c, get(of_rates + c) - get(g + c) * get(v + c));
            for (long c = 0; c < size; c += LANES) put(scratch + c, get(rates + c) * get(v + c));
            product(task, s, path + s * size, scratch, scratch + size);
            for (long c = 0; c < size; c += LANES) put(v + c, get(v + c) - get(scratch + size + c));
        }
    }

    // Takes a step on every batch of a task.
    void descend(int task, REAL rate, REAL *theta) {
        for (int s = 0; s < batches.steps; s++) {
            REAL loss = this->loss(task, s, theta, false);
            backward(places, layers, theta, true, -rate, theta);
            if (loss != loss) theta[0] = loss;  // an invalid label must not go unnoticed
        }
    }
};

// With `rates`, every task takes a step on each of its batches, in `theta` [tasks, numbers]. Without, `gradients` on the only
// batch, or only `losses`. Returns 0, or 1 if there is no memory.
extern "C" int train(const Layer *list, int layers, int tasks, int classes, const Batches *batches, REAL *theta,
                     const REAL *rates, REAL *gradients, REAL *losses) {
    Net net(list, layers, classes, *batches);
    if (net.rooms.full) return 1;
    for (int t = 0; t < tasks; t++, theta += net.size) {
        if (rates) net.descend(t, rates[t], theta);
        if (losses) losses[t] = net.loss(t, 0, theta, true);
        if (gradients) backward(net.places, layers, theta, false, 1, gradients + t * net.size);
    }
    return 0;
}

// What a round sums up: start - theta after a task's steps, the gradient of the query loss at theta, or that gradient taken through
// the steps, with respect to their start.
enum { DIFFERENCE, QUERY, THROUGH };

// Adds a task's contribution `own`, times its weight, to `total`, scaled down to the norm `clip` unless that is 0. It is left out
// if its numbers, their squares or its query loss are not finite. `squares_beside`: of numbers that belong to it as well.
// Returns its norm, NaN if it is left out; `factor` gets what it was multiplied with.
static double add_up(const REAL *own, long size, double weight, double clip, REAL loss, double *total,
                     double squares_beside = 0, double *factor = 0) {
    double squares[LANES] = {}, sum = squares_beside;
    for (long c = 0; c < size; c += LANES)
        for (int i = 0; i < LANES; i++) squares[i] += (double)own[c + i] * own[c + i];
    for (int i = 0; i < LANES; i++) sum += squares[i];
    bool finite = sum <= LARGEST && loss - loss == 0;
    double norm = finite ? sqrt(sum) : NAN, times = !finite ? 0 : clip > 0 && norm > clip ? weight * (clip / norm) : weight;
    for (long c = 0; finite && c < size; c++) total[c] += times * own[c];
    if (factor) *factor = times;
    return norm;
}

// Sums a round of tasks that all begin at `start`: contributions of the kind `of`, see `add_up`. With `rates` each number has its
// own, shared by all tasks, and the sum of the gradients with respect to them follows in `total`, for THROUGH alone. `norms`: of
// the contributions. Returns 0, or 1 if there is no memory.
extern "C" int sum_up(const Layer *list, int layers, int tasks, int classes, const Batches *batches, const Batches *query,
                      const REAL *start, const double *weights, double clip, double *total, REAL *losses, double *norms, int of,
                      double rate, const REAL *rates) {
    bool exact = of == THROUGH;
    Net net(list, layers, classes, *batches, exact), scored(list, layers, classes, *query);
    long size = net.size, steps = batches->steps;
    REAL *theta = net.rooms.take<REAL>(size), *own = net.rooms.take<REAL>(2 * size), *each = net.rooms.take<REAL>(size);
    REAL *path = exact ? net.rooms.take<REAL>(steps * size) : 0;
    REAL *slopes = exact ? net.rooms.take<REAL>(rates ? steps * size : size) : 0;
    REAL *scratch = exact ? net.rooms.take<REAL>(2 * size) : 0;
    if (net.rooms.full || scored.rooms.full) return 1;
    for (long c = 0; c < size; c++) each[c] = rates ? rates[c] : (REAL)rate;
    for (int t = 0; t < tasks; t++) {
        memcpy(theta, start, size * sizeof(REAL));
        if (exact)
            net.walk(t, each, theta, path, slopes, rates);
        else
            net.descend(t, (REAL)rate, theta);
        losses[t] = scored.loss(t, 0, theta, true);
        if (of == DIFFERENCE)
            for (long c = 0; c < size; c += LANES) put(own + c, get(start + c) - get(theta + c));
        else
            backward(scored.places, layers, theta, false, 1, own);
        if (exact) net.back(t, each, path, slopes, own, rates ? own + size : 0, scratch);
        norms[t] = add_up(own, rates ? 2 * size : size, weights[t], clip, losses[t], total);
    }
    return 0;
}

// Sums a round of Per-FedAvg (Fallah, Mokhtari, Ozdaglar 2020, Algorithm 1): start - w after `steps` local meta-steps on the MAML
// objective of one step, w <- w - beta (I - alpha H) v; without `exact` w <- w - beta v. The rest as in `sum_up`; the loss is that
// of the query after one more step on the support.
extern "C" int sum_of_meta_steps(const Layer *list, int layers, int tasks, int classes, const Batches *support,
                                 const Batches *query, const REAL *start, const double *weights, double clip, double *total,
                                 REAL *losses, double *norms, int steps, int exact, double alpha, double beta) {
    Net net(list, layers, classes, *support, exact), scored(list, layers, classes, *query);
    long size = net.size;
    REAL *w = net.rooms.take<REAL>(size), *ahead = net.rooms.take<REAL>(size), *v = net.rooms.take<REAL>(size);
    REAL *product = net.rooms.take<REAL>(size), a = (REAL)alpha, b = (REAL)beta;
    if (net.rooms.full || scored.rooms.full) return 1;
    for (int t = 0; t < tasks; t++) {
        memcpy(w, start, size * sizeof(REAL));
        for (int s = 0; s <= steps; s++) {
            REAL loss = net.loss(t, 0, w, false);
            backward(net.places, layers, w, true, -a, ahead);
            if (loss != loss) ahead[0] = loss;
            losses[t] = scored.loss(t, 0, ahead, true);
            if (s == steps) break;
            backward(scored.places, layers, ahead, false, 1, v);
            if (exact) net.product(t, 0, w, v, product);
            for (long c = 0; c < size; c += LANES)
                put(w + c, get(w + c) - b * (exact ? get(v + c) - a * get(product + c) : get(v + c)));
        }
        for (long c = 0; c < size; c += LANES) put(v + c, get(start + c) - get(w + c));
        norms[t] = add_up(v, size, weights[t], clip, losses[t], total);
    }
    return 0;
}

// The Hessian of every task's loss on its only batch, at `theta`, times `v`: to `products` [tasks, numbers], as both are.
extern "C" int product(const Layer *list, int layers, int tasks, int classes, const Batches *batches, const REAL *theta,
                       const REAL *v, REAL *products) {
    Net net(list, layers, classes, *batches, true);
    if (net.rooms.full) return 1;
    for (int t = 0; t < tasks; t++) net.product(t, 0, theta + t * net.size, v + t * net.size, products + t * net.size);
    return 0;
}

// The gradient through a descent, one step on each batch, at one `rate` a per task, or with `rates` [tasks, numbers] at one for
// each number. In `v` [tasks, numbers], the gradient with respect to the end becomes that with respect to the start `theta`;
// `of_rates` [tasks, numbers] gets that of the rates.
extern "C" int through(const Layer *list, int layers, int tasks, int classes, const Batches *batches, const REAL *theta,
                       const REAL *rate, const REAL *rates, REAL *v, REAL *of_rates) {
    Net net(list, layers, classes, *batches, true);
    long size = net.size, steps = batches->steps;
    REAL *path = net.rooms.take<REAL>(steps * size), *slopes = net.rooms.take<REAL>(of_rates ? steps * size : size);
    REAL *own = net.rooms.take<REAL>(size), *end = net.rooms.take<REAL>(size), *scratch = net.rooms.take<REAL>(2 * size);
    if (net.rooms.full) return 1;
    for (int t = 0; t < tasks; t++, theta += size, v += size) {
        for (long c = 0; !rates && c < size; c++) own[c] = rate[t];
        const REAL *a = rates ? rates + t * size : own;
        memcpy(end, theta, size * sizeof(REAL));
        net.walk(t, a, end, path, slopes, of_rates);
        net.back(t, a, path, slopes, v, of_rates ? of_rates + t * size : 0, scratch);
    }
    return 0;
}

// Every task's parameters after one step on each of its batches, each number at its own rate: in `theta` [tasks, numbers].
extern "C" int walk(const Layer *list, int layers, int tasks, int classes, const Batches *batches, REAL *theta,
                    const REAL *rates) {
    Net net(list, layers, classes, *batches);
    REAL *slopes = net.rooms.take<REAL>(net.size);
    if (net.rooms.full) return 1;
    for (int t = 0; t < tasks; t++) net.walk(t, rates + t * net.size, theta + t * net.size, 0, slopes, false);
    return 0;
}

// Every task's outputs f(theta) for its only batch [tasks, examples, height, width, channels padded], to `out`. With `d` in the
// same form also the gradient of <d, f(theta)> to `gradients`. `theta` is one for all tasks if it is `shared`.
extern "C" int outputs(const Layer *list, int layers, int tasks, int classes, const Batches *batches, const REAL *theta,
                       int shared, REAL *out, const REAL *d, REAL *gradients) {
    Net net(list, layers, classes, *batches);
    long size = net.size, count = net.outputs();
    if (net.rooms.full) return 1;
    for (int t = 0; t < tasks; t++, theta += shared ? 0 : size, out += count) {
        net.run(t, theta, out);
        if (!d) continue;
        net.pull(theta, out, d + t * count);
        backward(net.places, layers, theta, false, 1, gradients + t * size);
    }
    return 0;
}

// Sums a round of tasks that share `theta`, see `add_up`: the gradients of <d_support, f(theta)> + <d_query, f(theta)> for the
// tasks' batches. `beside` [tasks]: squares of what belongs to a task's contribution as well; `factors` [tasks]: what each was
// multiplied with.
extern "C" int sum_of_pulls(const Layer *list, int layers, int tasks, int classes, const Batches *support, const Batches *query,
                            const REAL *theta, const double *weights, double clip, double *total, const REAL *losses,
                            double *norms, const REAL *d_support, const REAL *d_query, const double *beside, double *factors) {
    Net first(list, layers, classes, *support), second(list, layers, classes, *query), *nets[2] = {&first, &second};
    long size = first.size;
    REAL *own[2], *out[2];
    for (int k = 0; k < 2; k++)
        own[k] = nets[k]->rooms.take<REAL>(size), out[k] = nets[k]->rooms.take<REAL>(nets[k]->outputs());
    if (first.rooms.full || second.rooms.full) return 1;
    for (int t = 0; t < tasks; t++) {
        for (int k = 0; k < 2; k++) {
            nets[k]->run(t, theta, out[k]);
            nets[k]->pull(theta, out[k], (k ? d_query : d_support) + t * nets[k]->outputs());
            backward(nets[k]->places, layers, theta, false, 1, own[k]);
        }
        for (long c = 0; c < size; c += LANES) put(own[0] + c, get(own[0] + c) + get(own[1] + c));
        norms[t] = add_up(own[0], size, weights[t], clip, losses[t], total, beside[t], factors + t);
    }
    return 0;
}

// With `v` [tasks, numbers]: the derivative of the outputs along it to `t_out`, and that of the gradient of <d, f(theta)> to
// `products`.
extern "C" int outputs_along(const Layer *list, int layers, int tasks, int classes, const Batches *batches, const REAL *theta,
                             const REAL *d, const REAL *v, REAL *t_out, REAL *products) {
    Net net(list, layers, classes, *batches, true);
    long size = net.size, count = net.outputs();
    REAL *out = net.rooms.take<REAL>(count), *zero = net.rooms.take<REAL>(count);
    if (net.rooms.full) return 1;
    for (int t = 0; t < tasks; t++, theta += size, v += size, t_out += count) {
        net.run(t, theta, out);
        forward_tangent(net.places, layers, theta, v, out, t_out);
        if (!finished(net.top().layer)) memcpy(t_out, net.top().t.z, count * sizeof(REAL));
        net.pull_tangent(theta, v, out, d + t * count, zero);
        backward_tangent(net.places, layers, theta, v, products + t * size);
    }
    return 0;
}

extern "C" int lanes() { return LANES; }
