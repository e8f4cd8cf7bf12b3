def test_time(cluster):
    import time
    o=("--spec", str(cluster.folder / "spec.yaml"), "--config", str(cluster.folder / "train.yaml"))
    t=time.time(); p=cluster.compiled(*o); print("compile", time.time()-t)
    for _ in range(2):
        r=cluster.run(p)
        print(r.state, {k:(v.state,round(v.seconds,1)) for k,v in r.tasks.items()})
        print(r.tasks["export"].log[-1500:])
    r=cluster.run(cluster.compiled(*o, cluster={"on_failure": "void"}), kill=lambda t,a,p:t=="train")
    print(r.tasks["finish"].log)
