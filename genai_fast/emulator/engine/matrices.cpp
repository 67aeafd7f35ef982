// mma: D = A B + C of 16 x 8 x K. Tensor cores add the exact products of a block of K in one go and cut off where the
// accumulator's last bit is: here after each such block, of 8 halves or of 4 TF32 numbers.
#include <algorithm>

#include "machine.h"

namespace {
template <class T, class Sum, int K> void mma(Warp& w, const Instruction& i, u32 m) {  // o: [0] D, [4] A, [8] B, [12] C
    if (m != ALL) fault(-1, "mma: only the lanes %08x came", m);
    constexpr int per = sizeof(T) == 2 ? 2 : 1;        // elements of a register
    constexpr int parts = K >= 4 * per * 2 ? 2 : 1;    // registers along K
    constexpr int block = std::min(K, 4 * per);
    f64 a[16][K], b[K][8], c[16][8];
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int h = 0; h < parts; h++)
            for (int e = 0; e < per; e++) {
                int k = h * 4 * per + t * per + e;
                a[g][k] = factor(w.at<T>(i.o[4 + 2 * h])[per * l + e]);
                a[g + 8][k] = factor(w.at<T>(i.o[5 + 2 * h])[per * l + e]);
                b[k][g] = factor(w.at<T>(i.o[8 + h])[per * l + e]);
            }
        for (int e = 0; e < 4; e++) {
            f64& to = c[g + e / 2 * 8][2 * t + e % 2];
            if constexpr (std::is_same_v<Sum, f32>) to = w.at<f32>(i.o[12 + e])[l];
            else to = f64(w.at<f16>(i.o[12 + e / 2])[2 * l + e % 2]);
        }
    }
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < K; k++) {
            for (int n = 0; n < 8; n++) c[r][n] += a[r][k] * b[k][n];
            if ((k + 1) % block == 0)
                for (int n = 0; n < 8; n++) c[r][n] = toward_zero(c[r][n]);
        }
    for (int l = 0; l < 32; l++)
        for (int e = 0; e < 4; e++) {
            f64 x = c[l / 4 + e / 2 * 8][2 * (l % 4) + e % 2];
            if constexpr (std::is_same_v<Sum, f32>) w.at<f32>(i.o[e])[l] = f32(x);
            else w.at<f16>(i.o[e / 2])[2 * l + e % 2] = f16(x);
        }
}
}  // namespace

void add_matrices(Table& R) {
    R["mma.m16n8k16.f32.bf16"] = mma<bf16, f32, 16>; R["mma.m16n8k8.f32.bf16"] = mma<bf16, f32, 8>;
    R["mma.m16n8k16.f32.f16"] = mma<f16, f32, 16>; R["mma.m16n8k8.f32.f16"] = mma<f16, f32, 8>;
    R["mma.m16n8k16.f16.f16"] = mma<f16, f16, 16>; R["mma.m16n8k8.f16.f16"] = mma<f16, f16, 8>;
    R["mma.m16n8k8.f32.tf32"] = mma<u32, f32, 8>; R["mma.m16n8k4.f32.tf32"] = mma<u32, f32, 4>;
}
