export OMP_NUM_THREADS=1 PY=/root/long/.venv/bin/python
run() { dir=$1; n=$2; shift 2; cd $dir
 $PY train.py --resume --name $n --steps 8000 "$@" > runs/$n.log 2>&1
 CODE=$dir $PY /root/retrieval.py runs/$n/last.pt >> /root/retrieval.log 2>&1; tail -n 1 runs/$n/log.jsonl >> /root/retrieval.log
 $PY evaluate.py --checkpoint runs/$n/last.pt --redraw --split val --tasks 76 --trials 4 --shots 1 --workers 1 --out runs/$n/val >> /root/retrieval.log 2>&1
 mkdir -p /root/rows/$n; cp runs/$n/val/results.json runs/$n/log.jsonl /root/rows/$n/; }
run /root/run base-0
run /root/exp wd-0 --weight-decay 0.3
run /root/long ours-0
run /root/run base-1 --seed 1
run /root/exp wd-1 --weight-decay 0.3 --seed 1
