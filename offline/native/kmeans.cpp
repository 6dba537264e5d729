// Exact weighted one-dimensional k-means, one problem a row, in parallel over rows.
//
// In one dimension optimal clusters are intervals of the sorted row, so dynamic programming over prefixes is exact:
//   best[c][j] = min_i best[c-1][i] + cost(i, j),   cost(i, j) = S2 - S1^2 / S0 over the points i..j-1.
// The optimal i grows with j (the cost satisfies the quadrangle inequality), so divide and conquer over j finds a
// whole stage in O(n log n): Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D",
// arXiv 1701.07204.
//
// Plain C ABI, no dependency; threads come from the OpenMP runtime that the process already uses.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace {

struct Row {
    int points = 0;                 // points of positive weight
    std::vector<double> mass;       // prefix sums of w
    std::vector<double> moment;     // prefix sums of w x
    std::vector<double> energy;     // prefix sums of w x^2
    std::vector<double> previous, current;
    std::vector<int32_t> split;     // [clusters][points + 1]: where the last cluster of a prefix starts
    std::vector<int32_t> order;

    double cost(int begin, int end) const {
        const double m = mass[end] - mass[begin];
        const double s = moment[end] - moment[begin];
        // beside huge weights the tiny ones vanish from the sums; such an interval costs nothing
        return m > 0 ? energy[end] - energy[begin] - s * s / m : 0.0;
    }

    // Fill current[low..high], knowing that the best split lies in [first, last].
    void stage(int32_t* split_row, int low, int high, int first, int last) {
        if (low > high) return;
        const int middle = low + (high - low) / 2;
        double best = std::numeric_limits<double>::infinity();
        int arg = first;
        const int stop = std::min(last, middle - 1);
        for (int i = first; i <= stop; ++i) {
            const double value = previous[i] + cost(i, middle);
            if (value < best) {
                best = value;
                arg = i;
            }
        }
        current[middle] = best;
        split_row[middle] = arg;
        stage(split_row, low, middle - 1, first, arg);
        stage(split_row, middle + 1, high, arg, last);
    }

    void solve(const float* value, const float* weight, int64_t columns, int clusters, float* centroids) {
        order.resize(columns);
        std::iota(order.begin(), order.end(), 0);
        bool any = std::any_of(weight, weight + columns, [](float w) { return w > 0; });
        if (any) {
            order.erase(std::remove_if(order.begin(), order.end(), [&](int32_t i) { return !(weight[i] > 0); }),
                        order.end());
        }
        std::sort(order.begin(), order.end(),
                  [&](int32_t a, int32_t b) { return value[a] != value[b] ? value[a] < value[b] : a < b; });
        points = static_cast<int>(order.size());
        mass.assign(points + 1, 0.0);
        moment.assign(points + 1, 0.0);
        energy.assign(points + 1, 0.0);
        // sums are about the middle of the row, which keeps S2 - S1^2/S0 well conditioned
        const double origin = value[order[points / 2]];
        for (int j = 0; j < points; ++j) {
            const double w = any ? weight[order[j]] : 1.0;
            const double x = value[order[j]] - origin;
            mass[j + 1] = mass[j] + w;
            moment[j + 1] = moment[j] + w * x;
            energy[j + 1] = energy[j] + w * x * x;
        }
        const int used = std::min(clusters, points);
        split.assign(static_cast<size_t>(used) * (points + 1), 0);
        previous.assign(points + 1, std::numeric_limits<double>::infinity());
        current.assign(points + 1, std::numeric_limits<double>::infinity());
        for (int j = 1; j <= points; ++j) previous[j] = cost(0, j);
        for (int c = 1; c < used; ++c) {
            std::fill(current.begin(), current.end(), std::numeric_limits<double>::infinity());
            stage(&split[static_cast<size_t>(c) * (points + 1)], c + 1, points, c, points - 1);
            std::swap(previous, current);
        }
        int end = points;
        for (int c = used - 1; c >= 0; --c) {
            const int begin = c == 0 ? 0 : split[static_cast<size_t>(c) * (points + 1) + end];
            const double m = mass[end] - mass[begin];
            centroids[c] = m > 0 ? static_cast<float>(origin + (moment[end] - moment[begin]) / m) : value[order[begin]];
            end = begin;
        }
        // fewer points than clusters: the table is filled up with its last entry
        for (int c = used; c < clusters; ++c) centroids[c] = centroids[used - 1];
    }
};

}  // namespace

// value, weight: float32 [rows, columns], row-major; centroids: float32 [rows, clusters], ascending on return.
// A row whose weights are all zero counts as a row of ones. Requires rows, columns, clusters >= 1.
extern "C" void requant_kmeans_rows(const float* value, const float* weight, int64_t rows, int64_t columns,
                                    int32_t clusters, float* centroids) {
#pragma omp parallel
    {
        Row row;
#pragma omp for schedule(dynamic, 8)
        for (int64_t r = 0; r < rows; ++r) {
            row.solve(value + r * columns, weight + r * columns, columns, clusters, centroids + r * clusters);
        }
    }
}
