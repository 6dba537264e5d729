// llama.cpp in a process of its own, through its Node binding, for `requant bench`.
//
//     node llama_cpp.mjs FOLDER MODEL.gguf THREADS SEQUENCES CONTEXT
//
// FOLDER is where `npm install node-llama-cpp` ran. Says {"ready": description} when the model is loaded; then reads a
// line {"prompts": [[token ids], ...], "new_tokens": N} and answers with a line [[seconds], ...]: when every token of
// every prompt came, counted from the request, greedy, all prompts at once.
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import path from "node:path";

const [folder, file, threads, sequences, context] = process.argv.slice(2);
const binding = path.resolve(folder, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel, readGgufFileInfo} = await import(pathToFileURL(binding));

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: path.resolve(file), useMmap: false});
const {metadata} = await readGgufFileInfo(path.resolve(file));
const pool = await model.createContext({
    contextSize: Number(context),
    sequences: Number(sequences),
    threads: {ideal: Number(threads), min: Number(threads)},
    batchSize: 512,
});
const free = Array.from({length: Number(sequences)}, () => pool.getSequence());

async function generate(sequence, tokens, count, start) {
    await sequence.clearHistory();
    const came = [];
    for await (const _ of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        came.push((performance.now() - start) / 1000);
        if (came.length === count) break;
    }
    return came;
}

console.log(JSON.stringify({ready: `llama.cpp ${llama.llamaCppRelease.release}, file type ${metadata.general.file_type}`}));
for await (const line of createInterface({input: process.stdin})) {
    const {prompts, new_tokens: count} = JSON.parse(line);
    const start = performance.now();
    const times = await Promise.all(prompts.map((tokens, i) => generate(free[i], tokens, count, start)));
    console.log(JSON.stringify(times));
}
process.exit(0);
