// Arithmetic of float16 and bfloat16, one or two at a time.
#include "elementwise.h"

namespace {
constexpr auto Add = [](auto a, auto b) { return a + b; };
constexpr auto Sub = [](auto a, auto b) { return a - b; };
constexpr auto Mul = [](auto a, auto b) { return a * b; };
constexpr auto Fma = [](auto a, auto b, auto c) { return std::fma(a, b, c); };

template <class T> void halves(Table& R, const std::string& t) {
    using P = Pair<T>;
    auto two = [&]<class F>(const std::string& name, F) {
        R[name + t] = binary<T, T, T, lift2<T, F{}>>;
        R[name + t + "x2"] = binary<P, P, P, pair2<T, lift2<T, F{}>>>;
    };
    two("add.", Add); two("sub.", Sub); two("mul.", Mul);
    two("max.", Max); two("min.", Min); two("max.nan.", MaxNan); two("min.nan.", MinNan);
    auto one = [&]<class F>(const std::string& name, F) {
        R[name + t] = unary<T, T, F{}>;
        R[name + t + "x2"] = unary<P, P, pair1<T, F{}>>;
    };
    one("neg.", [](T a) { return std::bit_cast<T>(u16(std::bit_cast<u16>(a) ^ 0x8000)); });
    one("abs.", [](T a) { return std::bit_cast<T>(u16(std::bit_cast<u16>(a) & 0x7fff)); });
    one("ex2.", [](T a) { return narrow<T>(std::exp2(wide(a))); });
    one("tanh.", [](T a) { return narrow<T>(std::tanh(wide(a))); });
    R["fma." + t] = ternary<T, T, T, T, lift3<T, Fma>>;
    R["fma." + t + "x2"] = ternary<P, P, P, P, pair3<T, lift3<T, Fma>>>;
}
}  // namespace

void add_halves(Table& R) {
    halves<f16>(R, "f16");
    halves<bf16>(R, "bf16");
}
