// wgmma (sm_90): four warps multiply 64 x K by K x N; each holds 16 rows of D. B, and A unless it is in registers, lie in
// shared memory as a descriptor says. Computed when it is issued; D reads as NaN until it is waited for, what it reads
// must not be written until then, and must have been fenced for the asynchronous proxy. Any use of D before is a fault.
#include <algorithm>

#include "checks.h"

namespace {
struct Descriptor {  // PTX ISA, "Matrix descriptor", and CUTLASS's canonical layouts
    u32 start, leading, stride, swizzle;  // bytes; swizzle: bytes of a row of the pattern, 16 for none

    explicit Descriptor(u64 d)
        : start(u32(d & 0x3fff) * 16), leading(u32(d >> 16 & 0x3fff) * 16), stride(u32(d >> 32 & 0x3fff) * 16) {
        const u32 widths[] = {16, 128, 64, 32};
        swizzle = widths[d >> 62];
        if (d >> 49 & 7) fault(-1, "wgmma: a descriptor with a base offset is not implemented");
    }
    // The address of the 16 bytes that hold element (row, k). Row: of M or N; `across`: rows are contiguous, not k.
    u32 chunk(u32 row, u32 k, u32 bytes, bool across) const {
        u32 per = 16 / bytes, at;
        if (!across) {
            if (swizzle == 16) at = start + row / 8 * stride + row % 8 * 16 + k / per * leading;
            else at = start + row / 8 * stride + row % 8 * swizzle + k * bytes;
        } else {
            u32 wide = swizzle / bytes;
            if (swizzle == 16) at = start + row / per * stride + k / 8 * leading + k % 8 * 16;
            else at = start + row / wide * leading + row % wide * bytes + k / 8 * stride + k % 8 * swizzle;
        }
        at &= ~15u;
        return swizzle == 16 ? at : at ^ ((at >> 7 & (swizzle / 16 - 1)) << 4);
    }
};

// Reads elements by 16-byte chunks, and remembers which.
template <class T> struct Reader {
    Warp& w;
    std::vector<u32> chunks;

    f64 operator()(const Descriptor& d, u32 row, u32 k, bool across) {
        u32 at = d.chunk(row, k, sizeof(T), across);
        auto recent = chunks.rbegin() + std::min<size_t>(chunks.size(), 4);
        if (std::find(chunks.rbegin(), recent, at) == recent) first(at);
        constexpr u32 per = 16 / sizeof(T);
        T x;
        memcpy(&x, &w.block->shared[at + (across ? row % per : k % per) * sizeof(T)], sizeof x);
        return factor(x);
    }
    void first(u32 at) {
        Block& b = *w.block;
        shared_bytes(w, at, 16, -1, false);
        u32 writer = b.written_by[at / 16];
        if (std::max(w.fenced_at, b.warps[writer].fenced_at) <= b.written_at[at / 16])
            report(w, b.copied[at / 16] ? Kind::UNFENCED_COPY : Kind::UNFENCED, w.pc, int(b.number), int(writer), at);
        count_fence(b.warps[writer], b.written_at[at / 16]);
        chunks.push_back(at);
        b.async_readers[at / 16]++;
    }
    // The one fence, of this warp or of the writer, after the write.
    void count_fence(const Warp& writer, u32 written_at) {
        int only = -1;
        for (const Warp* each : {&static_cast<const Warp&>(w), &writer})
            for (auto [pc, tick] : each->fences)
                if (tick > written_at) only = only == -1 || only == pc ? pc : -2;
        if (only >= 0) w.launch().counts[only].needed++;
    }
};

// mod: N, A in registers, A across, B across, signs differ; o: [0] scale of D, [1] A, [5] descriptor of B; extra: D
template <class T, int K> void wgmma(Warp& w, const Instruction& i, u32 m) {
    if (m != ALL) fault(-1, "wgmma: only the lanes %08x came", m);
    int n = i.mod[0], quarter = w.id % 4;
    const int* d = &w.launch().code.extra[i.imm];
    Reader<T> read{w, {}};
    static thread_local f64 a[16][16], b[16][256], sum[16][256];
    constexpr int per = sizeof(T) == 2 ? 2 : 1;
    if (i.mod[1]) {
        for (int l = 0; l < 32; l++)
            for (int h = 0; h < 2; h++)
                for (int e = 0; e < per; e++) {
                    int k = h * 4 * per + l % 4 * per + e;
                    a[l / 4][k] = factor(w.at<T>(i.o[1 + 2 * h])[per * l + e]);
                    a[l / 4 + 8][k] = factor(w.at<T>(i.o[2 + 2 * h])[per * l + e]);
                }
    } else {
        Descriptor of_a(w.at<u64>(i.o[1])[0]);
        if (i.mod[2])
            for (int k = 0; k < K; k++)
                for (int r = 0; r < 16; r++) a[r][k] = read(of_a, 16 * quarter + r, k, true);
        else
            for (int r = 0; r < 16; r++)
                for (int k = 0; k < K; k++) a[r][k] = read(of_a, 16 * quarter + r, k, false);
    }
    Descriptor of_b(w.at<u64>(i.o[5])[0]);
    if (i.mod[3])
        for (int k = 0; k < K; k++)
            for (int r = 0; r < n; r++) b[k][r] = read(of_b, r, k, true);
    else
        for (int r = 0; r < n; r++)
            for (int k = 0; k < K; k++) b[k][r] = read(of_b, r, k, false);
    if (quarter == 0) w.counts().wavefronts += (read.chunks.size() * 16 + 127) / 128;

    auto at = [&](int j, int l) -> f64& { return sum[l / 4 + j % 4 / 2 * 8][j / 4 * 8 + l % 4 * 2 + j % 2]; };
    bool keep = w.at<u32>(i.o[0])[0];
    Warp::Product* prior = nullptr;
    for (auto& p : w.products)
        if (p.d[0] == d[0] && p.n == n) prior = &p;
    for (int j = 0; j < n / 2; j++)
        for (int l = 0; l < 32; l++) at(j, l) = !keep ? 0 : prior ? prior->sum[j * 32 + l] : w.at<f32>(d[j])[l];
    f64 sign = i.mod[4] ? -1 : 1;
    for (int r = 0; r < 16; r++) {
        for (int k = 0; k < K; k++) {
            f64 x = sign * a[r][k];
            for (int q = 0; q < n; q++) sum[r][q] += x * b[k][q];
        }
        for (int q = 0; q < n; q++) sum[r][q] = toward_zero(sum[r][q]);
    }
    std::vector<f32> out(16 * n);
    w.in_flight.resize(w.launch().code.file_bytes / 64 + 1);
    for (int j = 0; j < n / 2; j++)
        for (int l = 0; l < 32; l++) {
            w.in_flight[d[j] / 64] = IN_FLIGHT;
            w.at<f32>(d[j])[l] = NAN;
            out[j * 32 + l] = f32(at(j, l));
        }
    if (prior && prior->group == w.wgmma_group) prior->sum = std::move(out);
    else w.products.push_back({w.wgmma_group, d, n, std::move(out)});
    w.reading.push_back({w.wgmma_group, std::move(read.chunks)});
}

void commit(Warp& w, const Instruction&, u32) { w.wgmma_group++; }

// Forgets what the last wait brought: this one would have brought it anyway, unless it waits for less.
void end_late(Warp& w, const Instruction& i) {
    Warp::Late& late = w.late;
    if (late.pc < 0) return;
    bool brought = s64(late.group) < s64(w.wgmma_group) - i.imm - (late.pc == w.pc);
    if (!brought) w.launch().counts[late.pc].needed++;
    for (int at : late.registers)
        if (w.in_flight[at] == WRITTEN) w.in_flight[at] = 0;
    for (u32 at : late.chunks) w.block->late[at] = 0;
    late = {};
}

void wait(Warp& w, const Instruction& i, u32) {  // imm: groups that may still be in flight
    end_late(w, i);
    u32 newest = u32(w.wgmma_group - i.imm - 1);
    auto in_flight = [&](u32 group) { return s64(group) >= s64(w.wgmma_group) - i.imm; };
    for (size_t k = 0; k < w.products.size();) {
        auto& p = w.products[k];
        if (in_flight(p.group)) {
            k++;
            continue;
        }
        bool again = false;  // a later product adds to this one
        for (size_t q = k + 1; q < w.products.size(); q++) again |= w.products[q].d[0] == p.d[0];
        if (!again)
            for (int j = 0; j < p.n / 2; j++) {
                w.in_flight[p.d[j] / 64] = p.group == newest ? WRITTEN : 0;
                if (p.group == newest) w.late.registers.push_back(p.d[j] / 64), w.late.pc = w.pc;
                memcpy(w.at<f32>(p.d[j]), &p.sum[j * 32], 128);
            }
        w.products.erase(w.products.begin() + k);
    }
    std::erase_if(w.reading, [&](auto& r) {
        if (in_flight(r.first)) return false;
        for (u32 at : r.second) {
            w.block->async_readers[at / 16]--;
            read_until_now(w, at);
            if (r.first != newest) continue;
            w.block->late[at / 16] = w.pc + 1;
            w.late.chunks.push_back(at / 16);
        }
        return true;
    });
    w.late.group = newest;
}
}  // namespace

void add_wgmma(Table& R) {
    R["wgmma.k16.bf16"] = wgmma<bf16, 16>;
    R["wgmma.k16.f16"] = wgmma<f16, 16>;
    R["wgmma.k8.tf32"] = wgmma<u32, 8>;
    R["wgmma.commit_group"] = commit;
    R["wgmma.wait_group"] = wait;
}
