// Token shift, QK-norm, rotation, forget gate and the page write: token after token of every (row, head).
#include "../pages.hpp"

static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// previous: raw numbers of the token before, which become those of this one; new_x: of this token, which are shifted.
static void shift(float a, float* previous, float* new_x) {
    for (int i = 0; i < D; i++) {
        float mixed = a * previous[i] + (1.0f - a) * new_x[i];
        previous[i] = new_x[i];
        new_x[i] = wide(narrow<NUMBER>(mixed));
    }
}

// shift_k, shift_v, norm and cos are null where there is nothing of the kind.
extern "C" void cache_write(const Pages* pages, const Table* table, const Batch* batch, int64_t layer, int64_t heads,
                            int64_t groups, const NUMBER* k, const NUMBER* v, const float* gate, const float* shift_k,
                            const float* shift_v, const float* norm, float norm_eps, const float* cos,
                            const float* sin, double gate_floor) {
    // A number of a token costs some 16 operations.
    const int64_t work = batch->starts[batch->rows] * heads * D * 16;
#pragma omp parallel for if (work >= WORTH_THREADS)
    for (int64_t item = 0; item < batch->rows * heads; item++) {
        int64_t row = item / heads, head = item % heads, stream = layer * heads + head, slot = batch->slots[row];
        if (slot == 0) continue;  // padding
        int64_t start = batch->starts[row], end = batch->starts[row + 1], kept = pages->kept;
        int64_t first = batch->lengths[row] - (end - start);
        std::vector<double> sums(groups, 0.0);
        float before_k[D] = {0}, before_v[D] = {0}, new_k[D], new_v[D];
        if (first > 0 && start < end) {  // what the page of the token before holds
            int64_t id = table->page_id(slot, stream, (first - 1) / PAGE), offset = (first - 1) % PAGE;
            for (int64_t g = 0; g < groups; g++) sums[g] = pages->gates.of(id)[g * PAGE + offset];
            for (int i = 0; i < D && kept; i++) {
                const NUMBER* last = pages->last.of(id) + offset % kept * 2 * D;
                before_k[i] = wide(last[i]), before_v[i] = wide(last[D + i]);
            }
        }
        for (int64_t token = start; token < end; token++) {
            int64_t position = first + token - start, offset = position % PAGE, at = token * heads + head;
            int64_t id = table->page_id(slot, stream, position / PAGE);
            for (int64_t g = 0; g < groups; g++) {
                double logit = gate[at * groups + g];
                double log_f = (logit > 0 ? 0.0 : logit) - std::log1p(std::exp(-std::fabs(logit)));
                sums[g] = (offset ? sums[g] : 0.0) + (log_f < gate_floor ? gate_floor : log_f);
                pages->gates.of(id)[g * PAGE + offset] = float(sums[g]);
            }
            for (int i = 0; i < D; i++) new_k[i] = wide(k[at * D + i]), new_v[i] = wide(v[at * D + i]);
            if (shift_k) shift(sigmoid(shift_k[at]), before_k, new_k);
            if (shift_v) shift(sigmoid(shift_v[at]), before_v, new_v);
            if (norm) {
                float inverse = 1.0f / std::sqrt(dot<D>(new_k, new_k) / D + norm_eps);
                for (int i = 0; i < D; i++)
                    new_k[i] = wide(narrow<NUMBER>(new_k[i] * inverse * norm[head * D + i]));
            }
            if (cos) {
                for (int i = 0; i < D / 2; i++) {
                    float one = new_k[i], two = new_k[D / 2 + i], c = cos[token * (D / 2) + i];
                    float s = sin[token * (D / 2) + i];
                    new_k[i] = one * c - two * s, new_k[D / 2 + i] = two * c + one * s;
                }
            }
            for (int i = 0; i < D; i++) {
                pages->k.of(id)[offset * D + i] = narrow<NUMBER>(new_k[i]);
                pages->v.of(id)[offset * D + i] = narrow<NUMBER>(new_v[i]);
            }
            if (kept) {
                NUMBER* last = pages->last.of(id) + offset % kept * 2 * D;
                std::copy_n(k + at * D, D, last), std::copy_n(v + at * D, D, last + D);
            }
        }
    }
}
