// Arithmetic and comparisons of float32 and float64. The `approx` functions are rounded correctly here; a GPU is up to
// two units in the last place off.
#include "elementwise.h"

namespace {
template <class T> void comparisons(Table& R, const std::string& t) {
    auto compare = [&]<class F>(const std::string& name, F) {
        R[name + t] = setp<T, F{}>;
        if constexpr (sizeof(T) == 2) R[name + t + "x2"] = setp_pair<T, F{}>;
    };
    compare("setp.eq.", [](T a, T b) { return wide(a) == wide(b); });
    compare("setp.ne.", [](T a, T b) { return wide(a) < wide(b) || (wide(a) > wide(b)); });
    compare("setp.lt.", [](T a, T b) { return wide(a) < wide(b); });
    compare("setp.le.", [](T a, T b) { return wide(a) <= wide(b); });
    compare("setp.gt.", [](T a, T b) { return (wide(a) > wide(b)); });
    compare("setp.ge.", [](T a, T b) { return wide(a) >= wide(b); });
    compare("setp.equ.", [](T a, T b) { return !(wide(a) < wide(b) || (wide(a) > wide(b))); });
    compare("setp.neu.", [](T a, T b) { return !(wide(a) == wide(b)); });
    compare("setp.ltu.", [](T a, T b) { return !(wide(a) >= wide(b)); });
    compare("setp.leu.", [](T a, T b) { return !(wide(a) > wide(b)); });
    compare("setp.gtu.", [](T a, T b) { return !(wide(a) <= wide(b)); });
    compare("setp.geu.", [](T a, T b) { return !(wide(a) < wide(b)); });
    compare("setp.num.", [](T a, T b) { return wide(a) == wide(a) && wide(b) == wide(b); });
    compare("setp.nan.", [](T a, T b) { return wide(a) != wide(a) || wide(b) != wide(b); });
}
template <class T> void arithmetic(Table& R, const std::string& t) {
    R["add." + t] = binary<T, T, T, [](T a, T b) { return a + b; }>;
    R["sub." + t] = binary<T, T, T, [](T a, T b) { return a - b; }>;
    R["mul." + t] = binary<T, T, T, [](T a, T b) { return a * b; }>;
    R["fma." + t] = ternary<T, T, T, T, [](T a, T b, T c) { return std::fma(a, b, c); }>;
    R["max." + t] = binary<T, T, T, [](T a, T b) { return Max(a, b); }>;
    R["min." + t] = binary<T, T, T, [](T a, T b) { return Min(a, b); }>;
    R["max.nan." + t] = binary<T, T, T, [](T a, T b) { return MaxNan(a, b); }>;
    R["min.nan." + t] = binary<T, T, T, [](T a, T b) { return MinNan(a, b); }>;
    R["neg." + t] = unary<T, T, [](T a) { return -a; }>;
    R["abs." + t] = unary<T, T, [](T a) { return std::fabs(a); }>;
    R["div." + t] = binary<T, T, T, [](T a, T b) { return a / b; }>;
    R["rcp." + t] = unary<T, T, [](T a) { return T(1) / a; }>;
    R["sqrt." + t] = unary<T, T, [](T a) { return std::sqrt(a); }>;
    R["rsqrt." + t] = unary<T, T, [](T a) { return T(1 / std::sqrt(f64(a))); }>;
    R["copysign." + t] = binary<T, T, T, [](T a, T b) { return std::copysign(b, a); }>;
}
void flushing(Table& R) {  // subnormals, in and out
    R["add.ftz.f32"] = binary<f32, f32, f32, [](f32 a, f32 b) { return ftz(ftz(a) + ftz(b)); }>;
    R["sub.ftz.f32"] = binary<f32, f32, f32, [](f32 a, f32 b) { return ftz(ftz(a) - ftz(b)); }>;
    R["mul.ftz.f32"] = binary<f32, f32, f32, [](f32 a, f32 b) { return ftz(ftz(a) * ftz(b)); }>;
    R["div.ftz.f32"] = binary<f32, f32, f32, [](f32 a, f32 b) { return ftz(ftz(a) / ftz(b)); }>;
    R["fma.ftz.f32"] =
        ternary<f32, f32, f32, f32, [](f32 a, f32 b, f32 c) { return ftz(std::fma(ftz(a), ftz(b), ftz(c))); }>;
    R["max.ftz.f32"] = binary<f32, f32, f32, [](f32 a, f32 b) { return ftz(Max(ftz(a), ftz(b))); }>;
    R["min.ftz.f32"] = binary<f32, f32, f32, [](f32 a, f32 b) { return ftz(Min(ftz(a), ftz(b))); }>;
    R["neg.ftz.f32"] = unary<f32, f32, [](f32 a) { return -ftz(a); }>;
    R["abs.ftz.f32"] = unary<f32, f32, [](f32 a) { return std::fabs(ftz(a)); }>;
    R["ex2.ftz.f32"] = unary<f32, f32, [](f32 a) { return ftz(f32(std::exp2(f64(ftz(a))))); }>;
    R["lg2.ftz.f32"] = unary<f32, f32, [](f32 a) { return ftz(f32(std::log2(f64(ftz(a))))); }>;
    R["rcp.ftz.f32"] = unary<f32, f32, [](f32 a) { return ftz(1 / ftz(a)); }>;
    R["sqrt.ftz.f32"] = unary<f32, f32, [](f32 a) { return ftz(std::sqrt(ftz(a))); }>;
    R["rsqrt.ftz.f32"] = unary<f32, f32, [](f32 a) { return ftz(f32(1 / std::sqrt(f64(ftz(a))))); }>;
}
}  // namespace

void add_floats(Table& R) {
    comparisons<f32>(R, "f32"); comparisons<f64>(R, "f64"); comparisons<f16>(R, "f16"); comparisons<bf16>(R, "bf16");
    arithmetic<f32>(R, "f32"); arithmetic<f64>(R, "f64");
    flushing(R);
    R["ex2.f32"] = unary<f32, f32, [](f32 a) { return f32(std::exp2(f64(a))); }>;
    R["lg2.f32"] = unary<f32, f32, [](f32 a) { return f32(std::log2(f64(a))); }>;
    R["sin.f32"] = unary<f32, f32, [](f32 a) { return f32(std::sin(f64(a))); }>;
    R["cos.f32"] = unary<f32, f32, [](f32 a) { return f32(std::cos(f64(a))); }>;
    R["tanh.f32"] = unary<f32, f32, [](f32 a) { return f32(std::tanh(f64(a))); }>;
}
