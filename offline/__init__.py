"""The converter: a causal language model in, a ReQuant checkpoint out. Never imports vLLM.

``models``       loading a model and finding the layers to quantize
``calibration``  token sequences to measure sensitivities on
``bases``        dense quantizers behind one interface
``pqi``          the post-quantization integral
``outliers``     algorithm 1, the self-adaptive outlier ratio
``significant``  algorithm 2, the step-wise detach of significant weights
``pipeline``     the six steps
``plan``         what they make of a model, known from its shapes; ``checks``: all that can be refused before they begin
``workload``     how often they do what takes long; ``estimate``: how long that is, ``resources``: what room it takes
``observer``     what a conversion says about itself while it runs
``run_metrics``  the same as a file for Prometheus
``evaluate``     perplexity, KL divergence, top-1 agreement; ``tasks``: those of lm-eval
``card``         the model card; ``hub``: where a checkpoint can be uploaded
"""
