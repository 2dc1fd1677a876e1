# In the repository's root, PYTHONPATH with vLLM, OUT: about 100 s of a GPU.
cd benchmarks
timeout 95 python3 layer_chain.py --parts few,many,wgmma,E4B,out,told --seconds 85 --out $OUT/layer-chain.json 2>&1 | tee $OUT/layer-chain.log
profile() {
    timeout 30 ncu --clock-control none --set full --kernel-name regex:nvfp4_stream --launch-skip 2 --launch-count 1 \
        --force-overwrite -o /tmp/$1 python3 stream_profile.py "$2" $3 >/tmp/$1.log 2>&1 || tail -5 /tmp/$1.log
    timeout 20 ncu --import /tmp/$1.ncu-rep --page details >$OUT/ncu-$1.txt 2>&1
    timeout 20 ncu --import /tmp/$1.ncu-rep --page source --csv >$OUT/ncu-$1-source.csv 2>&1
}
profile one "8, first 2, early 1000" 1
profile sixteen "8, first 2, early 1000" 16
