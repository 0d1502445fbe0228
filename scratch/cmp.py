import json,sys
def val(p): return {r["step"]:r for r in map(json.loads,open(p)) if "val_loss_q" in r}
def show(news, olds, steps):
    for s in steps:
        line=f"{s:6}"
        for p in news+olds:
            v=val(p)
            line += "  | "+ (f"{v[s]['val_loss_q']:.4f} {v[s].get('val_loss_partner',float('nan')):.4f} {v[s]['val_accuracy']:.3f}" if s in v else " -")
        print(line)
R="/work/main/results/"
import os
print("full: new0 | old0 old1 old2"); show(["/root/run/runs/final0/log.jsonl"],[R+f"seed{i}/log.jsonl" for i in range(3)], [500,1000,1500,2000,2500,3000,4000,5000,6000,8000,10000,12000,14000,16000,18000,20000,22000,24000,26000,28000,30000,33000])
print("quick"); show([p for p in [f"/root/run/runs/quick-{i}/log.jsonl" for i in range(1)]+[f"/root/run/runs/qlam-{i}/log.jsonl" for i in range(3)] if os.path.exists(p)],[R+f"quick/seed{i}/log.jsonl" for i in range(3)], range(500,5501,500))
