#!/usr/bin/env bash
# The one entry point of a fresh machine with Python 3.11: `bash run.sh help` lists the modes.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3.11}
NPROC=${NPROC:-1}
RUNS=${RUNS:-runs/demo}
# glibc's caches of small blocks cut the heap up: a run on a CPU takes up to a quarter less memory without them
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}

usage() {
    cat <<'TEXT'
bash run.sh            set up, then the demo: SFT of a tiny model, then dpo, tdpo1, ra_dpo1 and ra_dpo2 from it, on the
                       bundled Anthropic HH sample; ends with a table and a figure. Finished stages are skipped.
bash run.sh test       set up, then the test suite on two cores (WORKERS=8: on more); further arguments go to pytest
bash run.sh setup      only make .venv and install requirements.txt
bash run.sh flash-attn flash-attn's kernel beside torch's own, which is the default and enough but for soft-caps: a
                       prebuilt wheel, or where there is none for this torch, CUDA and Python its source, up to an hour
bash run.sh loop       three rounds of sample, label, align on the tiny model's own answers: a table, a figure and
                       runs/loop/samples.html, the answers before and after each round (SEED=1, LOSS=ra_dpo1)
bash run.sh controlled 15 methods in a world whose reward is known, rare catastrophes included: reward, its lower tail and
                       P(ruin) against drift, 4 betas, 5 seeds, into bench/results; what is there is not run again
                       (--quick: 6 methods, 2 betas, 1 seed; --results FILE: begin anew there)
bash run.sh compare    13 methods on SmolLM2-135M and the HH sample: rates chosen on dev, 3 to 5 seeds, three betas of
                       three methods, into bench/results, goes on where it stopped (OMP_NUM_THREADS=1 and --jobs 2:
                       about 3.5 hours on 2 cores; --large: for a GPU; --quick: that it runs, 18 minutes)
bash run.sh imdb       the published experiment on sentiment: SFT of GPT-2 Large on IMDb, samples, a classifier's
                       preferences, dpo, tdpo and ra_dpo at three levels, their samples' scores (GPUs; --small: a trial)
bash run.sh bench      the first tables of bench/README.md, on SmolLM2-135M: about half an hour on 2 cores, into runs/bench
bash run.sh step       the time and memory of one step: bench/step.py (all of these fetch the model, 93 MB)
bash run.sh exact      the errors of logp, kl and cvar against fp64 on SmolLM2-135M: bench/exact.py
bash run.sh parity     our losses against TRL's, in an environment of its own (1.5 GB): bench/parity.py
bash run.sh help       this text

NPROC=2 bash run.sh    two processes through torchrun       RUNS=DIR bash run.sh   another place for the demo's runs
PYTHON=python3.12      another interpreter for .venv
TEXT
}

setup() {
    if [ ! -x .venv/bin/python ]; then
        command -v "$PYTHON" >/dev/null || PYTHON=python3
        "$PYTHON" -m venv .venv
    fi
    if ! cmp -s requirements.txt .venv/installed.txt; then
        echo "installing requirements.txt into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed.txt
    fi
}

# flash-attn for .venv's torch. Its setup.py imports torch, hence no build isolation, and wheel, which a venv of
# Python 3.11 lacks; it takes a prebuilt wheel if it finds one, and else needs nvcc and ninja.
flash_attn() {
    local py=.venv/bin/python log=.venv/flash-attn.log lacks=""
    if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
        lacks="no nvcc on PATH or in CUDA_HOME"
    elif ! "$py" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
        lacks="the torch in .venv is one without CUDA"
    fi
    if [ -n "$lacks" ]; then
        echo "error: run.sh flash-attn: $lacks (nothing needs it: torch's own kernel is the default)" >&2
        exit 2
    fi
    echo "flash-attn: a prebuilt wheel if there is one for this torch, CUDA and Python; else its source is compiled"
    "$py" -m pip install --quiet --disable-pip-version-check wheel setuptools ninja packaging
    if ! "$py" -m pip install --verbose --disable-pip-version-check --no-build-isolation flash-attn 2>&1 | tee "$log" |
        sed -un -e 's/^ *Guessing wheel URL: */looking for the wheel /p' -e 's/^ *Raw wheel path.*/wheel: found/p' \
            -e 's/^ *Precompiled wheel not found.*/wheel: none; compiling the source, up to an hour/p' \
            -e 's/^ *\(Successfully installed\|Requirement already satisfied: flash-attn\)/\1/p'; then
        echo "error: run.sh flash-attn: it could not be installed (see $log; torch's own kernel goes on being used)" >&2
        exit 2
    fi
}

# launch SCRIPT ARGS...: python, or torchrun for NPROC > 1
launch() {
    if [ "$NPROC" -gt 1 ]; then
        .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"
    else
        .venv/bin/python "$@"
    fi
}

demo() {
    local loss
    launch sft.py configs/demo_sft.toml --out "$RUNS/sft" --resume auto
    for loss in dpo tdpo1 ra_dpo1 ra_dpo2; do
        launch align.py configs/demo.toml --loss "$loss" --model "$RUNS/sft/final" --out "$RUNS/$loss" --resume auto
    done
    .venv/bin/python plot.py "$RUNS"/{dpo,tdpo1,ra_dpo1,ra_dpo2} --out "$RUNS/comparison.png"
}

# The loop on one's own answers: SFT, then three times sample, label, align; the score is examples/loop.py's.
loop() {
    local out=${LOOP:-runs/loop} seed=${SEED:-0} loss=${LOSS:-dpo} from round
    local py=.venv/bin/python quick="--max-new-tokens 48 --max-prompt-length 128 --batch-size 64 --seed $seed"
    launch sft.py configs/demo_sft.toml --out "$out/sft" --seed "$seed" --resume auto
    # heldout DIR MODEL: answers to prompts that no round trains on, their scores, and how far they are from SFT
    heldout() {
        launch sample.py --model "$2" --data examples/hh_test.jsonl --answers 4 --out "$1/answers.jsonl" $quick
        PYTHONPATH=examples $py label.py --data "$1/answers.jsonl" --by loop:score --out "$1/heldout.jsonl"
        [ "$2" = "$out/sft/final" ] || [ -f "$1/drift/status.json" ] || launch align.py --model "$2" \
            --reference "$out/sft/final" --data "$1/heldout.jsonl" --eval-data "$1/heldout.jsonl" --loss kto_zero \
            --beta 1 --steps 0 --eval-examples 1000 --dtype float32 --out "$1/drift"
    }
    heldout "$out/sft" "$out/sft/final"
    from=$out/sft/final
    for round in 1 2 3; do
        local dir=$out/round-$round
        launch sample.py --model "$from" --data examples/hh_train.jsonl --prompts "${PROMPTS:-800}" --answers 4 \
            --out "$dir/train.jsonl" $quick --seed "$((seed + 100 * round))"
        PYTHONPATH=examples $py label.py --data "$dir/train.jsonl" --by loop:score --pairs best-worst \
            --out "$dir/pairs.jsonl"
        launch align.py configs/demo.toml --model "$from" --data "$dir/pairs.jsonl" --loss "$loss" --seed "$seed" \
            --lr 2e-5 --sample-prompts 8 --out "$dir" --resume auto
        heldout "$dir" "$dir/final"
        from=$dir/final
    done
    $py examples/loop.py "$out/sft" "$out"/round-{1,2,3} --out "$out"
}

# The published experiment on sentiment, with its own names; others' in IMDB_MODEL, IMDB_DATA, IMDB_CLASSIFIER.
imdb() {
    local out=${RUNS_IMDB:-runs/imdb} by=${IMDB_CLASSIFIER:-siebert/sentiment-roberta-large-english} method split dir
    local data=${IMDB_DATA:-imdb} py=.venv/bin/python prompts=10000 held=1000 small="" tokens=64
    local methods=(dpo tdpo1 tdpo2 "ra_dpo1 --confidence-level "{0.97,0.98,0.99} "ra_dpo2 --confidence-level 0.97")
    if [ "${1:-}" = --small ]; then
        prompts=24 held=16 small="--steps 4 --warmup-steps 1 --max-length 64 --max-prompt-length 32 --batch-size 8" tokens=12
        methods=("ra_dpo1 --confidence-level 0.97")
    fi
    local how="--chat-template none --prompt-tokens 8 --answers 4 --max-new-tokens $tokens --max-prompt-length 16"
    launch sft.py configs/imdb_gpt2_large_sft.toml --model "${IMDB_MODEL:-openai-community/gpt2-large}" \
        --data "$data" --out "$out/sft" --resume auto $small
    for split in train test; do
        launch sample.py --model "$out/sft/final" --data "$data" --split $split $how \
            --prompts "$([ $split = train ] && echo $prompts || echo $held)" --out "$out/answers_$split.jsonl"
        $py label.py --data "$out/answers_$split.jsonl" --by "$by" --label POSITIVE --pairs best-worst \
            --out "$out/pairs_$split.jsonl"
    done
    for method in "${methods[@]}"; do
        dir=$out/${method// --confidence-level /_}
        launch align.py configs/imdb_gpt2_large.toml --model "$out/sft/final" --data "$out/pairs_train.jsonl" \
            --eval-data "$out/pairs_test.jsonl" --loss $method --out "$dir" --resume auto $small
        launch sample.py --model "$dir/final" --data "$data" --split test --prompts $held $how --out "$dir/answers.jsonl"
        $py label.py --data "$dir/answers.jsonl" --by "$by" --label POSITIVE --score-only | tee "$dir/scores.md"
    done
    $py plot.py "$out"/*dpo*/ --out "$out/comparison.png"
}

smollm2() {
    .venv/bin/python -c "import gguf, accelerate" 2>/dev/null || .venv/bin/python -m pip install --quiet gguf accelerate
    .venv/bin/python examples/get_smollm2.py models/smollm2
}

# Every table of bench/README.md. Nothing else should run on the machine meanwhile.
bench() {
    local out=runs/bench model=models/smollm2
    mkdir -p "$out"
    run() { echo "== bench/$1.py" && .venv/bin/python "bench/$1.py" "${@:2}" --out "$out/$1.md"; }
    .venv/bin/python bench/exact.py --model "$model" | tee "$out/exact.md"
    run head --model "$model"
    run scaling --figure "$out/memory.png"
    run rows --model "$model" --rows 2000 10000
    run step --model "$model" --warmup 1 --profile --rows dpo tdpo1 "ra_dpo1, cvar" "ra_dpo1, erm" "dpo, 2 processes"
    run vs_published --model "$model" --warmup 1
    run vs_trl --model "$model" --warmup 1
}

mode=${1:-demo}
[ $# -gt 0 ] && shift
case "$mode" in
    help | -h | --help) usage ;;
    setup) setup ;;
    flash-attn) setup && flash_attn ;;
    demo) setup && demo ;;
    loop) setup && loop ;;
    controlled) setup && OMP_NUM_THREADS=1 .venv/bin/python examples/controlled.py "$@" ;;
    compare) setup && smollm2 && .venv/bin/python examples/compare.py "$@" ;;
    imdb) setup && imdb "$@" ;;
    # a file is one process's, for its tests share what they have trained
    test) setup && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@" ;;
    bench) setup && smollm2 && bench ;;
    step) setup && smollm2 && .venv/bin/python bench/step.py --model models/smollm2 "$@" ;;
    parity) setup && .venv/bin/python bench/parity.py "$@" ;;
    exact) setup && smollm2 && .venv/bin/python bench/exact.py --model models/smollm2 "$@" ;;
    *)
        echo "error: run.sh: no mode '$mode' (bash run.sh help lists them)" >&2
        exit 2
        ;;
esac
