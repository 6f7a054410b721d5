"""One example per command, which ``--help`` shows below the options; a test parses all of them."""

from __future__ import annotations

EXAMPLES = {
    "pretrain": "nest-fn pretrain -c nest_large data.train=train.jsonl data.valid=valid.jsonl --folder runs/large",
    "replay": "nest-fn replay runs/large 1200 trainer.device=cpu",
    "verify": "nest-fn verify runs/large --from 1000 --steps 50",
    "diff": "nest-fn diff runs/large runs/other --rerun trainer.device=cpu",
    "report": "nest-fn report runs/large runs/other --out report.html",
    "study": "nest-fn study study.yaml --folder studies/masks",
    "data scan": "nest-fn data scan corpus/ corpus.jsonl --hash",
    "data validate": "nest-fn data validate train.jsonl valid.jsonl",
    "data stats": "nest-fn data stats train.jsonl",
    "data import": "nest-fn data import cuts.jsonl.gz --out corpus",
    "data shard": "nest-fn data shard train.jsonl --out shards --shards 64",
    "data synth": "nest-fn data synth synthetic --minutes 10",
    "config show": "nest-fn config show nest_large encoder.dropout=0",
    "config diff": "nest-fn config diff nest_small nest_large",
    "config keys": "nest-fn config keys 'trainer.keep_*' mask",
    "convert": "nest-fn convert runs/large model.safetensors",
    "export": "nest-fn export runs/large encoder.onnx",
    "extract": "nest-fn extract runs/large test.jsonl --out features --layers all",
    "tokenize": "nest-fn tokenize runs/large test.jsonl --out tokens",
    "probe": "nest-fn probe runs/large --label speaker --train train.jsonl --test test.jsonl",
    "analyse": "nest-fn analyse runs/large gradients codes --out analysis",
    "finetune-ctc": "nest-fn finetune-ctc runs/large data.train=train.jsonl data.valid=valid.jsonl --out recogniser",
    "transcribe": "nest-fn transcribe recogniser test.jsonl --out recognised.jsonl",
    "doctor": "nest-fn doctor runs",
    "bench": "nest-fn bench --out bench.json",
    "completion": "nest-fn completion bash",
    "demo": "nest-fn demo --folder runs/demo",
}
