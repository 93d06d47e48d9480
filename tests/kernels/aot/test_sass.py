"""Loops are found in machine code, whatever else jumps, and counted for what they are."""

from types import SimpleNamespace

import pytest

from heterolora.kernels import sass
from heterolora.kernels.gpu.tiles import Tile
from heterolora.kernels.mixes import Loop

# A persistent kernel: an outer loop with two inner ones, both waiting for a barrier in a small loop
# of their own behind the exit, and a loop without tensor cores.
KERNEL = """
.text.kernel:
        /*0000*/               @P0 EXIT ;
.L_x_0:
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   HMMA.16816.F32.BF16 R24, R56, R92, R28 ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R11 ;
        /*0040*/              @!P1 BRA `(.L_x_7) ;
.L_x_2:
        /*0050*/                   LDSM.16.MT88.4 R56, [R1] ;
        /*0060*/              @!PT LDS RZ, [RZ] ;
        /*0070*/                   LDS.128 R60, [R2+0x10] ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R56.reuse, R92, R28 ;
        /*0090*/                   BRA.U UP0, `(.L_x_3) ;
        /*00a0*/                   HMMA.16816.F32.BF16 R24, R56, R92, R28 ;
.L_x_3:
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*00c0*/              @!P2 BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R11 ;
        /*00e0*/              @!P1 BRA `(.L_x_8) ;
.L_x_5:
        /*00f0*/                   HMMA.1688.F32.TF32 R24, R56, R92, R28 ;
        /*0100*/               @P3 BRA `(.L_x_4) ;
.L_x_6:
        /*0110*/                   FADD R1, R2, R3 ;
        /*0120*/               @P4 BRA `(.L_x_6) ;
        /*0130*/               @P5 BRA `(.L_x_0) ;
        /*0140*/                   EXIT ;
.L_x_7:
        /*0150*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R11 ;
        /*0160*/              @!P1 BRA `(.L_x_7) ;
        /*0170*/                   BRA `(.L_x_2) ;
.L_x_8:
        /*0180*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R11 ;
        /*0190*/              @!P1 BRA `(.L_x_8) ;
        /*01a0*/                   BRA `(.L_x_5) ;
.L_x_9:
        /*01b0*/                   BRA `(.L_x_9);
"""


def test_the_two_loops_are_found():
    first, second = sass.matmul_loops(KERNEL)
    # Waiting belongs to the loop, wherever its code is.
    assert sass._count(first) == Loop(tensor=2, copies=1, shared=4 * 128 + 4 * 128, issued=13)
    assert sass._count(second) == Loop(tensor=1, copies=0, shared=0, issued=7)
    assert sass.tensor_flops(first, warps=8) == 2 * 8 * 2 * 16 * 8 * 16
    assert sass.tensor_flops(second, warps=4) == 4 * 2 * 16 * 8 * 8


@pytest.mark.parametrize(
    ("name", "modifiers", "flops"),
    [
        ("HGMMA", ".64x256x16.F32.BF16", 2 * 64 * 256 * 16 * 2),
        ("UTCHMMA", "", None),
        ("HMMA", ".1688.F32", 2 * 16 * 8 * 8 * 8),
        ("HMMA", ".SOMETHING", None),
        ("FFMA", "", 0),
    ],
)
def test_flops_of_an_instruction(name, modifiers, flops):
    assert sass.tensor_flops([(name, modifiers)], warps=8) == flops


@pytest.fixture
def disassembled(monkeypatch):
    """What `nvdisasm` would print."""

    def give(text):
        done = SimpleNamespace(stdout=text)
        monkeypatch.setattr(sass.subprocess, "run", lambda *_, **__: done)

    return give


def test_loops_must_do_what_a_step_is(disassembled):
    kernel = SimpleNamespace(asm={"cubin": b"", "ptx": "mma;"})
    disassembled(KERNEL)
    # Two HMMA of 8 warps are 32x32x32, one of TF32 half the depth of a quarter.
    with pytest.raises(ValueError, match="65536 FLOPs in one turn of a loop, not 131072"):
        sass.mix(kernel, Tile(32, 32, 64), 8)
    found = sass.mix(kernel, Tile(32, 32, 32), 8)
    assert found.rest == 28 - found.base.issued - found.low.issued
    disassembled(KERNEL.replace("HMMA.1688", "FFMA.X"))
    with pytest.raises(ValueError, match="1 loops with tensor core instructions, not 2"):
        sass.mix(kernel, Tile(32, 32, 32), 8)


def test_a_jump_to_nowhere_known_is_refused():
    with pytest.raises(ValueError, match="only the GPU knows"):
        sass.matmul_loops(KERNEL.replace("@P4 BRA `(.L_x_6)", "BRX R4 -0x10"))


def test_a_digest_is_of_the_code():
    code = '.file 1 "/a/b.py"\n.visible .entry k()\n  .loc 1 7 0\n  // note\n  add.s32 %r1, %r2;\n'
    same = code.replace("7 0", "9 4").replace("/a/b", "/c") + ".section .debug_str { .b8 1 }"
    assert sass.digest(code) == sass.digest(same)
    assert sass.digest(code) != sass.digest(code.replace("add", "sub"))
