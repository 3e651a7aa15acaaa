#!/bin/bash
# Compiles and runs the C and C++ hosts of this folder, and examples/train.cpp, against a build of the library.
#
#     tests/c/run.sh LIBRARY_DIR [--asan] [--cuda]
#
# --asan   a second time with AddressSanitizer and UndefinedBehaviorSanitizer in the hosts (the library itself is not instrumented)
# --cuda   with the part on GPU memory; an error when there is no GPU
#
# A library with libtorch needs libtorch's folder in LD_LIBRARY_PATH. CC and CXX choose the compilers (gcc and g++).
set -euo pipefail  # so no `| grep -q`: it leaves before the program in front of it has said everything

here=$(cd "$(dirname "$0")" && pwd)
include=$(cd "$here/../../include" && pwd)
asan= cuda= folder=
for argument; do
    case $argument in
        --asan) asan=1 ;;
        --cuda) cuda=1 ;;
        -*) echo "run.sh: unknown option $argument" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
[ -n "$folder" ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$(cd "$folder" && pwd)
library=$folder/liblycore.so
[ -f "$library" ] || { echo "run.sh: no $library; build the library first" >&2; exit 2; }

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
status=0
# One failure does not hide another.
fail() { echo "run.sh: $*" >&2; status=1; }

CC=${CC:-gcc} CXX=${CXX:-g++}
warnings="-Wall -Wextra -Wpedantic -Werror"
c="$CC -std=c99 -O1 -g $warnings -I$include"
cxx="$CXX -std=c++17 -O1 -g $warnings -I$include"
link="-L$folder -llycore -Wl,-rpath,$folder -lm -ldl -pthread"

# The header: alone, in every standard that a host may use, with all warnings.
printf '#include <lycore.h>\n' >"$build/alone.c"
cp "$build/alone.c" "$build/alone.cpp"
for standard in c99 c11 c17 c2x; do $CC -std=$standard -fsyntax-only $warnings -I"$include" "$build/alone.c"; done
for standard in c++11 c++17 c++20; do $CXX -std=$standard -fsyntax-only $warnings -I"$include" "$build/alone.cpp"; done

# Twice in one unit, and in two units of one program: it must define nothing.
printf '#include <lycore.h>\n#include <lycore.h>\nuint32_t other(void) { return lycore_version_number(); }\n' >"$build/one.c"
printf '#include <lycore.h>\nuint32_t other(void);\nint main(void) { return other() == lycore_version_number() ? 0 : 1; }\n' >"$build/two.c"
$c "$build/one.c" "$build/two.c" -o "$build/twice" $link
"$build/twice" || fail "two units of one program disagree about the version"

# The README's program, which finds no file here and says so.
sed -n '/^```c$/,/^```$/{/^```/!p}' "$here/../../README.md" >"$build/readme.c"
$c "$build/readme.c" -o "$build/readme" $link
said=$(cd "$build" && ./readme 2>&1) && fail "the README's program succeeds without its file"
[[ $said == *style.safetensors* ]] || fail "the README's program does not name its file: $said"

# The library: it exports what the header declares and nothing else, and knows its own name.
declared() { grep -oE '\blycore_[a-z_0-9]+\(' "$include/lycore.h" | tr -d '(' | sort -u; }
exported() { nm -D --defined-only "$library" | awk '{print $NF}' | sort -u; }
difference=$(diff <(declared) <(exported)) || fail "header (<) and exports (>) differ:
$difference"
# Without a SONAME a program would record the path of the folder that it was linked from.
readelf -d "$library" | grep 'SONAME.*\[liblycore\.so\]' >/dev/null || fail "$library has no SONAME liblycore.so"

# Every function of the header is misused.
for function in $(declared); do
    grep -qE "\b$function\(" "$here/misuse.h" "$here/misuse.c" "$here/misuse_order.c" || fail "misuse.c and misuse_order.c never call $function"
done

# hosts SUFFIX FLAGS: compiles all hosts with the flags and runs them.
hosts() {
    local suffix=$1 flags=$2 name
    for name in host misuse misuse_order; do $c $flags "$here/$name.c" -o "$build/$name$suffix" $link; done
    $cxx $flags "$here/host.cpp" -o "$build/host_cpp$suffix" $link
    for name in host misuse misuse_order host_cpp; do
        "$build/$name$suffix" || fail "$name$suffix failed ($?)"
    done
}
export RUST_BACKTRACE=0
if [ -n "$cuda" ]; then
    $c "$here/host.c" -o "$build/host_cuda" $link
    "$build/host_cuda" cuda | tee "$build/cuda.txt" || fail "host cuda failed"
    ! grep -q '^skipped' "$build/cuda.txt" || fail "--cuda was asked for, but there is no GPU"
fi
hosts "" ""
if [ -n "$asan" ]; then
    export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
    hosts _asan "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    for name in host misuse misuse_order host_cpp; do
        nm "$build/${name}_asan" | grep __asan_init >/dev/null || fail "$name was built without the sanitizer"
    done
    ! nm -D "$library" | grep __asan_init >/dev/null || echo "run.sh: the library is instrumented, too"
    # The leak checker works here at all: a host that forgets its memory must fail.
    printf '#include <stdlib.h>\nvoid *volatile p;\nint main(void) { p = malloc(7); p = NULL; return 0; }\n' >"$build/leak.c"
    $c -fsanitize=address "$build/leak.c" -o "$build/leak"
    ! "$build/leak" 2>/dev/null || fail "the leak checker finds no leaks on this machine"
fi

# The example on libtorch, for a library that is: its loss falls, and what it saves can be opened.
torch=$(ldd "$library" | sed -n 's|.* => \(.*\)/lib/libtorch_cpu\.so .*|\1|p')
if [ -n "$torch" ]; then
    headers="-isystem $torch/include -isystem $torch/include/torch/csrc/api/include"
    # Without optimisation: libtorch's headers take long enough.
    $CXX -std=c++17 $warnings -I"$include" $headers "$here/../../examples/train.cpp" -o "$build/train" \
        $link -L"$torch/lib" ${cuda:+-Wl,--no-as-needed -ltorch_cuda} -ltorch -ltorch_cpu -lc10
    if said=$("$build/train" "$build" ${cuda:+cuda}); then
        sed -n 's/.*: loss \([0-9.]*\),.*/\1/p' <<<"$said" | awk 'NR == 1 { first = $1 } END { exit !(NR == 5 && $1 < first / 10) }' ||
            fail "the example's loss does not fall: $said"
        [[ $said == *"3 modules in "* && -s $build/example.state ]] || fail "the example saves nothing: $said"
    else
        fail "the example failed: $said"
    fi
fi
[ $status = 0 ] && echo "run.sh: all hosts passed with $library"
exit $status
