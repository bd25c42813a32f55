"""Makes what Python for Windows lacks in FOLDER/python: python.exe, python3.dll, and the functions of complex numbers, which Wine lacks.

python .ci/wine.py FOLDER
"""

import subprocess
import sys
from pathlib import Path

import pefile

FOLDER = Path(sys.argv[1])
PYTHON, SYSTEM = FOLDER / "python", FOLDER / "wine" / "drive_c" / "windows" / "system32"
MATHS, OURS = b"api-ms-win-crt-math-l1-1-0.dll", b"our-ms-win-crt-math-l1-1-0.dll"
REAL, COMPLEX = ("cabs", "carg", "cimag", "creal"), ["catan", "ccos", "ccosh", "cexp", "clog", "csin", "csinh", "csqrt", "ctan", "ctanh"]
START = """
#include <windows.h>
int wmain(int argc, wchar_t **argv) {
    return ((int (*)(int, wchar_t **)) GetProcAddress(LoadLibraryW(L"python311.dll"), "Py_Main"))(argc, argv);
}
"""


def compiled(target: str, source: str, *options: str) -> None:
    command = ["x86_64-w64-mingw32-gcc", "-O2", "-static", "-s", "-x", "c", "-", "-x", "none", *options, "-o", str(PYTHON / target)]
    subprocess.run(command, input=source.encode(), check=True)


def library(name: str, source: str, behind: Path, own: dict[str, str]) -> None:
    """A library with all that another one exports, of which some functions are its own."""
    names = [each.name.decode() for each in pefile.PE(str(behind)).DIRECTORY_ENTRY_EXPORT.symbols if each.name]
    lines = [f"  {each} = {own.get(each, f'{behind.stem}.{each}')}" for each in names]
    definitions = FOLDER / f"{name}.def"
    definitions.write_text("\n".join([f'LIBRARY "{name}"', "EXPORTS", *lines]))
    compiled(name, source, "-shared", str(definitions))


def complex_maths() -> tuple[str, dict[str, str]]:
    """C of the functions, whose arguments Windows passes as structures, and their names; long double is double there."""
    lines, own = ["#include <complex.h>"], {}
    for suffix, kind in (("", "double"), ("f", "float"), ("l", "double")):
        call = "f" if suffix == "f" else ""
        lines.append(f"typedef struct {{ {kind} re, im; }} C{suffix};")
        given = f"C{suffix}"
        lines.append(f"static {kind} complex to{suffix}({given} z) {{ {kind} complex w; __real__ w = z.re; __imag__ w = z.im; return w; }}")
        lines.append(f"static {given} of{suffix}({kind} complex w) {{ return ({given}) {{__real__ w, __imag__ w}}; }}")
        lines += [f"{kind} our_{name}{suffix}({given} z) {{ return {name}{call}(to{suffix}(z)); }}" for name in REAL]
        lines += [f"{given} our_{name}{suffix}({given} z) {{ return of{suffix}({name}{call}(to{suffix}(z))); }}" for name in COMPLEX]
        lines.append(f"{given} our_cpow{suffix}({given} a, {given} b) {{ return of{suffix}(cpow{call}(to{suffix}(a), to{suffix}(b))); }}")
        own |= {f"{name}{suffix}": f"our_{name}{suffix}" for name in (*REAL, *COMPLEX, "cpow")}
    return "\n".join(lines), own


compiled("python.exe", START, "-municode")
library("python3.dll", "", PYTHON / "python311.dll", {})
code, complex_functions = complex_maths()
library(OURS.decode(), code, SYSTEM / "ucrtbase.dll", complex_functions)
for path in [*PYTHON.rglob("*.pyd"), *PYTHON.rglob("*.dll")]:
    if path.name not in (OURS.decode(), "python311.dll") and MATHS in (content := path.read_bytes()):
        path.write_bytes(content.replace(MATHS, OURS))
metadata = PYTHON / "Lib" / "importlib" / "metadata" / "__init__.py"  # of an older 3.11, which calls it in another way
text = metadata.read_text("utf-8")
metadata.write_text(text.replace("\n    def invalidate_caches(cls)", "\n    @classmethod\n    def invalidate_caches(cls)"), "utf-8")
