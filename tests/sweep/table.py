from __future__ import annotations
from .cases import Report
def page(reports: list[Report]) -> str:
    out=[]
    for r in reports:
        out.append(f"{r.kind}: {r.reason[:150]}")
        for k,f in r.layouts.items(): out.append(f"    {k}: stock={f.stock[:60]} | zero={f.zero[:60]} | weighted={f.weighted[:160]}")
    return "\n".join(out)
