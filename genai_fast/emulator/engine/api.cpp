// The functions that Python calls (kernel.py).
#include <algorithm>

#include "scheduler.h"

namespace {
const Table& table() {
    static const Table found = [] {
        Table R;
        for (auto add : {add_integers, add_bits, add_floats, add_halves, add_conversions, add_memory, add_async_copies,
                         add_atomics, add_exchanges, add_matrices, add_wgmma})
            add(R);
        return R;
    }();
    return found;
}
}  // namespace

extern "C" {
int emulator_knows(const char* name) { return table().count(name); }

// Rows of `rows`: flow, guard, negated, target, mod, o. All names must be known.
Code* emulator_code(int n, const char** names, const int* rows, const s64* immediates, int n_extra, const int* extra,
                    int file_bytes, int constant_bytes) {
    auto code = new Code{{}, std::vector<int>(extra, extra + n_extra), file_bytes, constant_bytes};
    for (int k = 0; k < n; k++) {
        const int* row = rows + k * (4 + MODIFIERS + OPERANDS);
        Instruction i{table().at(names[k]), row[0], row[1], row[2], row[3], {}, {}, immediates[k]};
        memcpy(i.mod, row + 4, sizeof i.mod);
        memcpy(i.o, row + 4 + MODIFIERS, sizeof i.o);
        code->instructions.push_back(i);
    }
    return code;
}
void emulator_free(Code* code) { delete code; }

// 0, or 1 after a fault: then `error` is "<instruction>|<block and lane>: <what>". At most `most` findings are written.
int emulator_launch(const Code* code, const int* grid, int threads, int shared_bytes, const u8* constants, int n_ranges,
                    const Range* ranges, const Options* options, Counts* counts, Finding* findings, int most,
                    int* n_findings, Notes* notes, char* error, int error_bytes) {
    Launch k{*code, std::vector<Range>(ranges, ranges + n_ranges), *options};
    k.counts.resize(code->instructions.size());
    k.random.seed(options->seed);
    int failed = 0;
    try {
        run_grid(k, grid, threads, shared_bytes, constants);
    } catch (const Fault& f) {
        snprintf(error, error_bytes, "%d|%s", f.pc, f.what.c_str());
        failed = 1;
    }
    std::copy(k.counts.begin(), k.counts.end(), counts);
    *n_findings = std::min<int>(most, int(k.findings.size()));
    std::copy_n(k.findings.begin(), *n_findings, findings);
    *notes = k.notes;
    return failed;
}
}
