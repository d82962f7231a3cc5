"""The reader of machine code, on a listing whose counts are known; on real code: `test_gate.py`."""

import struct

import pytest

from pae_kernels import machine_code

LISTING = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R20, desc[UR6][R10.64] ;
        /*0020*/               @P1 LDG.E.U16.CONSTANT R4, desc[UR6][R2.64] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R51], desc[UR16][R42.64], !P5 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/                   LDS.128 R4, [R5] ;
        /*0080*/                   FFMA R1, R2, R3, R4 ;
        /*0090*/                   FFMA R1, R2, R3, R4 ;
        /*00a0*/                   FFMA R1, R2, R3, R4 ;
        /*00b0*/                   FFMA R1, R2, R3, R4 ;
        /*00c0*/                   FFMA R1, R2, R3, R4 ;
        /*00d0*/              @!P2 BRA 0x150 ;
        /*00e0*/               @P0 BRA 0x70 ;
        /*00f0*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;
        /*0100*/              @UP1 BRA 0x40 ;
        /*0110*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0120*/               @P0 EXIT ;
        /*0130*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0140*/                   EXIT ;
        /*0150*/                   FADD R1, R1, R1 ;
        /*0160*/                   BRA 0xf0 ;
        /*0170*/                   RET.REL.NODEC R2 ;
        /*0180*/                   BRA 0x180;
        /*0190*/                   NOP;
"""


def test_counts_of_a_listing():
    code = machine_code.Code(LISTING)
    assert len(code.instructions) == 24  # none behind the last return
    assert code.widths("LDG") == {16: 1, 128: 1} and code.widths("STG") == {32: 1, 64: 1}
    assert code.count({"HMMA", "HGMMA"}) == 2 and code.count({"HMMA", "HGMMA"}, "TF32") == 1
    # the outer loop with what lies apart and the inner one; no loop where that jumps back to
    assert tuple(map(len, code.bodies)) == (15, 8)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        (32, 8, 0, 8),  # all warps
        (255, 8, 96 * 1024, 1),  # registers
        (128, 8, 64 * 1024, 2),
        (129, 4, 0, 3),  # handed out by eight a thread
        (40, 4, 100 * 1024, 2),  # shared memory
        (40, 4, 228 * 1024, 0),
        (16, 1, 0, 32),  # programs
    ],
)
def test_programs_of_a_multiprocessor(registers, warps, shared, programs):
    assert machine_code.occupancy(90, warps, registers, shared) == programs


def test_code_of_a_binary_that_is_no_kernel_or_several():
    """An ELF file of its sections' names and 16 bytes of each."""

    def elf(*names):
        words = b"\0" + b"".join(name + b"\0" for name in (b".shstrtab", *names))
        at = [words.index(name + b"\0") for name in (b".shstrtab", *names)]
        body = [words, *(bytes([i]) * 16 for i in range(len(names)))]
        table = 64 + sum(map(len, body))
        head = bytearray(64)
        struct.pack_into("<Q", head, 0x28, table)
        struct.pack_into("<HHH", head, 0x3A, 64, len(body), 0)
        heads, offset = b"", 64
        for name, piece in zip(at, body, strict=True):
            heads += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, len(piece), 0, 0, 0, 0)
            offset += len(piece)
        return bytes(head) + b"".join(body) + heads

    assert machine_code.code_of(elf(b".nv.info", b".text.kernel")) == b"\1" * 16
    for count, names in ((0, [b".nv.info"]), (2, [b".text.a", b".text.b"])):
        with pytest.raises(ValueError, match=f"one kernel, got {count}"):
            machine_code.code_of(elf(*names))
